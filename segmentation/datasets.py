"""The ADE20K layout by path: images/{training,validation}, annotations/{training,validation}, classes.json."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS

from backbones.training.images import UnreadableImageError
from backbones.training.rng import seed_everything
from backbones.training.skips import SkipCounter
from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, check_name

from .transforms import IGNORE, MAX_CLASSES, read_mask

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MASKS_CHECKED_AT_START = 20
# Streams of random numbers that must not coincide.
AUGMENTATION_SEED, ITERATION_SEED = 1, 2


@DATASETS.register_module()
class ADELayoutDataset(BaseSegDataset):
    """Images and masks found by path; mask value 0 is unlabelled, value k is class k of ``classes.json``.

    Args:
        data_root: folder that holds ``images``, ``annotations`` and, for other classes than ADE20K's 150,
            ``classes.json`` (a JSON list of names for the mask values 1, 2, ...).
        split: ``training`` or ``validation``.
        seed: what augmentation depends on, together with a sample's position in training.
        kwargs: as mmseg's BaseSegDataset; ``metainfo=dict(classes=...)`` goes before ``classes.json``.

    Raises:
        UserError: missing or empty folder, image without mask, mask with values outside the classes.
    """

    def __init__(self, data_root: str, split: str, seed: int = 0, metainfo: dict | None = None, **kwargs: Any):
        self.split = split
        self.seed = seed
        prefix = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        super().__init__(
            data_root=str(data_root),
            data_prefix=prefix,
            metainfo=metainfo or class_metainfo(data_root),
            reduce_zero_label=True,
            **kwargs,
        )
        self.skips = SkipCounter(len(self))

    def digest(self) -> str:
        """Of the images' names, wherever their folder lies."""
        names = sorted(Path(self.get_data_info(index)["img_path"]).name for index in range(len(self)))
        return sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()

    def load_data_list(self) -> list[dict]:
        """One entry per image of the split; mmseg calls it once."""
        folder, masks = Path(self.data_prefix["img_path"]), Path(self.data_prefix["seg_map_path"])
        num_classes = len(self._metainfo["classes"])
        if not folder.is_dir():
            raise UserError(
                f"segmentation data: {folder} does not exist. Set data_root to a folder with images/{self.split} and "
                f"annotations/{self.split} (the ADE20K layout); it is {self.data_root!r}."
            )
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise UserError(f"segmentation data: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        entries = []
        for image in images:
            mask = (masks / image.relative_to(folder)).with_suffix(".png")
            if not mask.is_file():
                raise UserError(f"the image {image} has no mask; expected {mask}. Add the mask or remove the image.")
            entry = {"img_path": str(image), "seg_map_path": str(mask), "num_classes": num_classes}
            entries.append(entry | {"label_map": None, "reduce_zero_label": True, "seg_fields": []})
        step = max(1, len(entries) // MASKS_CHECKED_AT_START)
        for entry in entries[::step]:
            try:
                read_mask(entry["seg_map_path"], num_classes)
            except UnreadableImageError:
                continue  # counted, or an error, when its turn comes
        return entries

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        """A sample; ``index`` is (index, position in training) from ``PositionedSampler``, or an index."""
        if isinstance(index, tuple):
            index, position = index
            seed_everything(AUGMENTATION_SEED, self.seed, position)
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            try:
                return self.prepare_data(at)
            except UnreadableImageError as error:
                info = self.get_data_info(at)
                if self.test_mode:
                    files = f"the image {info['img_path']} or its mask {info['seg_map_path']}"
                    raise UserError(f"cannot read {files}: {error}. Repair or remove them.") from None
                self.skips.skip(at, f"{info['img_path']} (or its mask)", error)
        raise UserError(f"no image of {self.data_root} could be read.")


@DATA_SAMPLERS.register_module()
class PositionedSampler(InfiniteSampler):
    """mmengine's InfiniteSampler yielding (index, position): augmentation depends on neither worker nor restart."""

    _start = 0

    def __iter__(self):
        for count, index in enumerate(self.indices, self._start):
            yield index, count * self.world_size + self.rank

    def skip(self, num_samples: int) -> None:
        super().skip(num_samples)
        self._start = num_samples


def class_weights(dataset: ADELayoutDataset, exponent: float) -> list[float]:
    """Loss weights frequency^-exponent per class, of mean 1, from up to 200 masks.

    1 is the median frequency balancing of arXiv 1411.4734 up to a factor, 0.5 its gentler square root.
    """
    num_classes = len(dataset.metainfo["classes"])
    pixels = np.zeros(num_classes + 1)
    for index in range(0, len(dataset), max(1, len(dataset) // 200)):
        try:
            mask = read_mask(dataset.get_data_info(index)["seg_map_path"], num_classes)
        except UnreadableImageError:
            continue
        pixels += np.bincount(mask[mask != IGNORE].ravel(), minlength=num_classes + 1)
    frequency = np.maximum(pixels[1:] / max(pixels[1:].sum(), 1), 1e-4)
    weights = frequency**-exponent
    return (weights / weights.mean()).round(4).tolist()


def class_metainfo(data_root: str | Path) -> dict[str, Any]:
    """Class names of ``data_root/classes.json``, else ADE20K's 150 with their colours.

    Raises:
        UserError: for a file that is not a list of 1 to 254 different names.
    """
    path = Path(data_root) / "classes.json"
    if not path.exists():
        return dict(ADE20KDataset.METAINFO)
    names = read_json(path, "class names")
    valid = isinstance(names, list) and all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)
    if not valid or not 1 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{path} must be a JSON list of 1 to {MAX_CLASSES} different names, for mask values 1, 2, ...")
    for name in names:
        check_name(f"a class in {path}", name)
    return {"classes": names}
