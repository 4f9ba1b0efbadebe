"""Images of a classification data set: folders, tar files and CIFAR batches, through timm's readers and loader."""

import tarfile
from collections.abc import Iterator
from hashlib import sha256
from multiprocessing import sharedctypes
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.readers import create_reader
from torch.utils.data import DataLoader, Dataset, Sampler

from backbones.training.images import MAX_PIXELS, UnreadableImageError, read_image
from backbones.training.processes import Processes
from backbones.training.rng import sample_seed
from backbones.training.skips import SkipCounter
from backbones.utils.errors import UserError, check_name

from .config import Recipe
from .folders import check_folder, check_tar

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "eval", "test")


class Source(Protocol):
    """Images and their class indices."""

    classes: list[str]
    max_pixels: int  # of an image that is decoded

    def __len__(self) -> int: ...
    def load(self, index: int) -> tuple[Image.Image, int]: ...
    def name(self, index: int) -> str: ...
    def digest(self) -> str:
        """Of what the images are, wherever they lie: the same for a copy in another folder."""


class ReaderSource:
    """Class folders or a .tar of them, read by timm. ``classes`` fixes the numbering, for a validation split."""

    def __init__(self, path: Path, classes: list[str] | None = None):
        self.path, self.max_pixels = path, MAX_PIXELS
        options: dict[str, Any] = {"class_map": {name: i for i, name in enumerate(classes)}} if classes else {}
        tar = path.suffix == ".tar"
        if tar:
            check_tar(path)
            options["cache_tarinfo"] = False  # timm's cache is a pickle beside the data
        else:
            check_folder(path)
        try:
            self.reader = create_reader("", root=str(path), **options)
        except RuntimeError as error:
            raise UserError(
                f"{path} holds no images ({error}). Put each class's images in a folder of its own."
            ) from None
        except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
            raise UserError(
                f"cannot read {path}: {error}. It is damaged or holds no images in folders of classes."
            ) from None
        self.classes = list(self.reader.class_name_to_idx if tar else self.reader.class_to_idx)
        for name in filter(None, self.classes):
            check_name(f"the name of a class in {path}", name)
        if not len(self.reader):
            raise UserError(f"{path} holds no images. Put each class's images in a folder of its own.")

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        if self.path.is_dir():
            file, target = self.reader.samples[index]
        else:
            try:
                file, target = self.reader[index]
            except (OSError, tarfile.TarError) as error:
                raise UnreadableImageError(str(error)) from error
        return read_image(file, lambda image: image.convert("RGB"), self.max_pixels, "data.max_pixels"), target

    def name(self, index: int) -> str:
        return str(self.path / self.reader.filename(index)) if self.path.is_dir() else self.reader.filename(index)

    def digest(self) -> str:
        return sha256("\0".join(self.reader.filenames()).encode(errors="surrogateescape")).hexdigest()


class CifarSource:
    """The published CIFAR-10/100 batches, through torchvision, which checks their digests before it reads them."""

    def __init__(self, root: Path, train: bool):
        from torchvision.datasets import CIFAR10, CIFAR100

        self.max_pixels = MAX_PIXELS
        kind = CIFAR10 if (root / CIFAR10.base_folder).is_dir() else CIFAR100
        try:
            self.dataset = kind(str(root), train=train)
        except RuntimeError as error:
            raise UserError(
                f"the CIFAR batches in {root} are incomplete or damaged ({error}). Unpack them again."
            ) from None
        self.classes = self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return f"CIFAR image {index}"

    def digest(self) -> str:
        return str(self.dataset.train_list if self.dataset.train else self.dataset.test_list)


class Images(Dataset):
    """A source with timm's transform (set by ``create_loader``), and with randomness that belongs to the sample.

    Augmentation is seeded by (seed, epoch, index), so that neither the number of workers nor a resume changes it.

    Args:
        skips: counts unreadable images, which are replaced by the next one; None = an unreadable image is an error.
        indices: the part of the source to use; None = all.
    """

    def __init__(self, source: Source, seed: int, skips: SkipCounter | None = None, indices: range | None = None):
        self.source, self.seed, self.skips = source, seed, skips
        self.indices = indices if indices is not None else range(len(source))
        self.transform: Any = None
        self._epoch = sharedctypes.RawValue("q", 0)  # shared with workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        index = self.indices[position]
        image, target = self._load(index)
        with sample_seed(self.seed, self._epoch.value, index):
            return self.transform(image), target

    def _load(self, index: int) -> tuple[Image.Image, int]:
        while True:
            try:
                return self.source.load(index)
            except UnreadableImageError as error:
                name = self.source.name(index)
                if self.skips is None:
                    raise UserError(f"cannot read the image {name} ({error}). Repair or remove it.") from None
                self.skips.skip(index, name, error)  # ends the run past its limit, so this loop ends
                index = (index + 1) % len(self.source)


def open_split(root: str, split: str, names: tuple[str, ...], classes: list[str] | None = None) -> Source:
    """The training or validation images under ``root``.

    Args:
        split: name of the split's folder or tar; "" = the first of ``names`` that exists.
        classes: the training split's classes, for a validation split.

    Raises:
        UserError: when nothing is there, the folder is empty, or a class is unknown to ``classes``.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"data.root {root} is not a folder. Give the folder that holds train and val.")
    if any((folder / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")):
        return CifarSource(folder, train="train" in names)
    candidates = [folder / f"{name}{suffix}" for name in ([split] if split else names) for suffix in ("", ".tar")]
    path = next((p for p in candidates if (p.is_file() if p.suffix == ".tar" else p.is_dir())), None)
    if path is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        wanted = " or ".join(repr(name) for name in ([split] if split else names))
        hint = " Unpack the .tar.gz first." if ".tar.gz" in there else ""
        raise UserError(f"{root} has no folder or .tar named {wanted}; it holds: {there}.{hint}")
    source = ReaderSource(path)
    if classes is None or source.classes == classes:
        return source
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        raise UserError(f"{path} has the class {unknown[0]!r}, which the training images lack. Remove or rename it.")
    return ReaderSource(path, classes)


class EpochSampler(Sampler[int]):
    """The order of one epoch, this process's share of it, from any place in it.

    Args:
        images: their number.
        batch_size: images of a step of this process.
        rank, size: this process among all; what is left over by ``size`` is left out.
    """

    def __init__(self, images: int, batch_size: int, rank: int, size: int):
        self.images, self.batch_size, self.rank, self.size = images, batch_size, rank, size
        self._generator, self._first = torch.Generator(), 0

    def start(self, seed: int, epoch: int, first: int) -> None:
        """Chooses the epoch, and the step of it to begin with."""
        self._generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        self._first = first * self.batch_size

    def __len__(self) -> int:
        return self.images // self.size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.images, generator=self._generator)[: len(self) * self.size]
        return iter(order[self.rank :: self.size][self._first :].tolist())


def train_loader(
    recipe: Recipe, source: Source, skips: SkipCounter, img_size: tuple[int, int], world: Processes
) -> DataLoader:
    """Shuffled, augmented batches of (images, class indices), this process's share of them."""
    augment, train = recipe.augment, recipe.train
    source.max_pixels = recipe.data.max_pixels
    whole = train.batch_size * world.size
    if len(source) < whole:
        raise UserError(
            f"{len(source)} training images are fewer than one batch of {whole}. "
            f"Set train.batch_size to at most {len(source) // world.size}."
        )
    loader = create_loader(
        Images(source, train.seed, skips),
        is_training=True,
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment or None,
        re_prob=augment.erasing,
        re_mode="pixel",
        interpolation=recipe.data.interpolation,
        **_common(recipe, img_size, world.device),
    )
    return _with_own_generators(loader, EpochSampler(len(source), train.batch_size, world.rank, world.size))


def start_epoch(loader: DataLoader, seed: int, epoch: int, first: int = 0) -> None:
    """Chooses the order and the augmentation of one epoch and its first step, whatever was drawn before."""
    loader.dataset.set_epoch(epoch)
    loader.sampler.start(seed, epoch, first)


def val_loader(recipe: Recipe, source: Source, img_size: tuple[int, int], world: Processes) -> DataLoader:
    """Every ``world_size``-th image in order, centre-cropped: sums over processes are exact, without duplicates."""
    interpolation = recipe.data.interpolation
    source.max_pixels = recipe.data.max_pixels
    loader = create_loader(
        Images(source, recipe.train.seed, indices=range(world.rank, len(source), world.size)),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=recipe.data.crop_pct,
        **_common(recipe, img_size, world.device),
    )
    return _with_own_generators(loader)


def _with_own_generators(loader: DataLoader, sampler: Sampler | None = None) -> DataLoader:
    """Keeps shuffling and starting workers from drawing on the generators that dropout and mixup use.

    Args:
        loader: timm's, which knows transforms and collation, perhaps wrapped in its prefetcher.
        sampler: to take the place of the loader's.
    """
    inner = getattr(loader, "loader", loader)
    ours = DataLoader(
        inner.dataset,
        inner.batch_size,
        sampler=sampler or inner.sampler,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        drop_last=inner.drop_last,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator(),
    )
    if inner is loader:
        return ours
    loader.loader = ours
    return loader


def _common(recipe: Recipe, img_size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    return {
        "input_size": (3, *img_size),
        "batch_size": recipe.train.batch_size,
        "mean": recipe.data.mean,
        "std": recipe.data.std,
        "num_workers": recipe.data.workers,
        "device": device,
        "use_prefetcher": device.type == "cuda",
        "pin_memory": device.type == "cuda",
    }
