"""Whether class folders, or a tar of them, can be walked through: no loops of links, no members but files."""

import os
import tarfile
from pathlib import Path, PurePosixPath

from backbones.utils.errors import UserError, shown

_MOST_FOLDERS = 10**6
_DEEPEST = 64


def check_folder(path: Path) -> None:
    """Raises UserError for folders that links lead into again, which a walk that follows links would not leave."""
    left, count = [(path, frozenset[tuple[int, int]]())], 0
    while left:
        folder, above = left.pop()
        info = folder.stat()
        own = (info.st_dev, info.st_ino)
        count += 1
        if own in above or count > _MOST_FOLDERS or len(above) > _DEEPEST:
            raise UserError(
                f"{folder} leads back into itself through a link, or is one of too many folders. Remove the link, and "
                "put each class's images in a folder of its own."
            )
        with os.scandir(folder) as entries:
            left.extend((Path(entry.path), above | {own}) for entry in entries if entry.is_dir())


def check_tar(path: Path) -> None:
    """Raises UserError for a damaged tar file, and one with members that are no plain files within it."""
    try:
        with tarfile.open(path, "r:") as archive:
            before = -1
            for member in archive:
                if member.offset <= before:
                    raise tarfile.ReadError("its members do not follow each other")
                before = member.offset
                _check_member(member, path)
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, MemoryError, OverflowError) as error:
        raise UserError(f"cannot read {path}: {error}. It is damaged or not a tar file.") from None


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    if not (member.isreg() or member.isdir()) or member.sparse:
        kind = "a link" if member.islnk() or member.issym() else "no plain file"
        raise UserError(
            f"{path} holds {shown(member.name)}, which is {kind}. Pack the images themselves: tar --dereference"
        )
    parts = PurePosixPath(member.name).parts
    if ".." in parts or member.name.startswith("/"):
        raise UserError(f"{path} holds {shown(member.name)}, outside of itself. Pack the folder from within.")
