"""What the machine, another process or a user's file did to a run, in words; everything else is a defect of ours."""

import errno
import os
import tarfile
import traceback

_PERMISSION = "no permission for {file}. Choose a folder you may write to, or change its permissions."
_CODES = {
    errno.ENOSPC: "no disk space left while writing {file}. Free space or choose another folder.",
    errno.EDQUOT: "no disk space left while writing {file}: the quota is used up. Free space or choose another folder.",
    errno.EROFS: "the disk of {file} is read-only. Choose another folder.",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOENT: "{file} does not exist, or was removed while this ran. Check the path, and leave folders in place.",
    errno.ENOTDIR: "{file} leads through a file as if it were a folder. Check the path.",
    errno.EISDIR: "{file} is a folder; a file is needed. Check the path.",
    errno.ENAMETOOLONG: "the name {file} is too long. Choose a shorter one.",
    errno.ELOOP: "{file} is a chain of links without an end. Repair them.",
    errno.EIO: "the disk failed at {file}. Copy the data to another disk.",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n), or use fewer workers.",
    errno.ENFILE: "too many open files on this machine. Close some programs, or use fewer workers.",
    errno.ENOMEM: "memory ran out. Lower the batch size, the image size or the number of workers.",
    errno.EPIPE: "who read the output of this command has gone. Run it again, perhaps with its output in a file.",
}
_MEMORY = "memory ran out ({reason}). Lower the batch size, the image size or the number of workers."
_WORKER = (
    "a data-loading worker died ({reason}). The machine may be out of memory or of shared memory: lower the number of "
    "workers (0 loads in the main process) or the batch size, and continue with --resume."
)
_RANK = "another process of this run was lost ({reason}). See its own message, and continue all with --resume."
_OF_RANKS = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Socket Timeout")
_TEXTS = (  # parts of the messages of errors without a class of their own
    (("DataLoader worker",), ("exited unexpectedly", "killed by signal", "Bus error", "shared memory"), _WORKER),
    (("unable to", "Unexpected bus error"), ("shared memory", "open shared", "mmap"), _WORKER),
    (_OF_RANKS, (), _RANK),
    (("terminated with signal", "terminated with exit code"), (), _RANK),
    (("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"), (), _MEMORY),
    (("No space left on device",), (), _CODES[errno.ENOSPC].format(file="a file")),
)
_RANK_CLASSES = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ProcessExitedException")
_PARSERS = ("json", "yaml", "ast", "tarfile", "xml")


def describe_environment(error: BaseException) -> str | None:
    """One message for what is no defect of this program, with what to do; None for anything else."""
    reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    classes = {kind.__name__ for kind in type(error).__mro__}
    message: str | None = None
    if isinstance(error, OSError):
        message = _of_os(error, reason)
    elif isinstance(error, tarfile.TarError):
        message = "a tar file is damaged or none ({reason}). Copy it again."
    elif isinstance(error, UnicodeError):
        message = "a text is not UTF-8 ({reason}). Save it as UTF-8, and set a UTF-8 locale (LC_ALL=C.UTF-8)."
    elif isinstance(error, MemoryError) or "OutOfMemoryError" in classes:
        message = _MEMORY
    elif isinstance(error, RecursionError):
        message = "a file is nested too deeply to be read. Write it flat." if _while_parsing(error) else None
    elif classes & set(_RANK_CLASSES):
        message = _RANK
    elif isinstance(error, RuntimeError) or "SafetensorError" in classes or "ProcessRaisedException" in classes:
        message = _of_text(str(error))
    return message and message.replace("{reason}", reason[:300])


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error is that of a collective operation, which another process did not take part in."""
    classes = {kind.__name__ for kind in type(error).__mro__}
    return bool(classes & set(_RANK_CLASSES)) or any(part in str(error) for part in _OF_RANKS)


def _of_os(error: OSError, reason: str) -> str:
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    known = _CODES.get(error.errno or 0)
    if known is not None:
        return known.replace("{file}", file)
    if error.errno is None:
        return reason
    return f"{os.strerror(error.errno)}: {file}. Check the disk and the path."


def _of_text(text: str) -> str | None:
    for first, second, message in _TEXTS:
        if any(part in text for part in first) and (not second or any(part in text for part in second)):
            return message
    return None


def _while_parsing(error: BaseException) -> bool:
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.partition(".")[0] in _PARSERS for name in frames)
