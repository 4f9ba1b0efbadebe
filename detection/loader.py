"""How images reach the detector: an endless stream of training samples that any process can enter anywhere.

The sample at a position of the stream, with its augmentation, depends on the seed and the position alone: not on the
number of workers, and not on what came before. That is what makes a resumed run equal to one that never stopped.
"""

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import (
    SizeMismatchError,
    _apply_exif_orientation,
    check_image_size,
    convert_PIL_to_numpy,
)
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from backbones.training.images import UnreadableImageError, read_image
from backbones.training.rng import sample_seed
from backbones.training.skips import SkipCounter
from backbones.utils.errors import UserError


class Mapper(DatasetMapper):
    """Detectron2's mapper, of images and instances alone, on this project's reader of images."""

    def __init__(self, cfg: CfgNode, **options: Any):
        super().__init__(image_format=cfg.INPUT.FORMAT, **options)
        self.max_pixels = cfg.INPUT.MAX_PIXELS

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with ``image`` (C, H, W) and, in training, ``instances``.

        Raises:
            UnreadableImageError: when the file cannot be decoded.
        """
        record = copy.deepcopy(record)
        image = read_image(record["file_name"], self._decode, self.max_pixels, "INPUT.MAX_PIXELS")
        check_image_size(record, image)
        inputs = T.AugInput(image)
        try:
            transforms = self.augmentations(inputs)
        except ValueError as error:  # resized, a side would be nothing
            width, height = image.shape[1::-1]
            raise UnreadableImageError(f"{width}x{height} pixels are too narrow to be resized") from error
        record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, inputs.image.shape[:2])
        return record

    def _decode(self, image: Image.Image) -> np.ndarray:
        return convert_PIL_to_numpy(_apply_exif_orientation(image), self.image_format)


def training_mapper(cfg: CfgNode) -> DatasetMapper:
    """Flip and large-scale jitter to IMAGE_SIZE, as ViTDet trains."""
    size, lsj = cfg.INPUT.IMAGE_SIZE, cfg.INPUT.LSJ
    augmentations: list[T.Augmentation] = [
        T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, size, size),
        T.FixedSizeCrop(crop_size=(size, size), pad=False),
    ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.insert(0, T.RandomFlip(horizontal=not vertical, vertical=vertical))
    return Mapper(
        cfg,
        is_train=True,
        augmentations=augmentations,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
        recompute_boxes=cfg.MODEL.MASK_ON,  # a crop cuts boxes; what is left of the mask gives the tight one
    )


def inference_mapper(cfg: CfgNode) -> DatasetMapper:
    """Shortest side to MIN_SIZE_TEST, longest at most MAX_SIZE_TEST."""
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return Mapper(cfg, is_train=False, augmentations=[resize])


class TrainingStream(Dataset):
    """Sample ``position`` of an endless stream: a new shuffle every epoch, augmentation seeded by the position.

    Args:
        records: Detectron2 dataset dicts.
        mapper: reads and augments one.
        seed: of shuffles and augmentation.
        skips: counts unreadable images; the next image of the shuffle takes the place of one.
    """

    def __init__(self, records: list[dict[str, Any]], mapper: DatasetMapper, seed: int, skips: SkipCounter):
        self.records = DatasetFromList(records)
        self.mapper = mapper
        self.seed = seed
        self.skips = skips

    def __getitem__(self, position: int) -> dict[str, Any]:
        count = len(self.records)
        for attempt in range(count):
            epoch, place = divmod(position + attempt, count)
            index = int(_shuffle(self.seed, epoch, count)[place])
            record = self.records[index]
            try:
                with sample_seed(self.seed, position):
                    return self.mapper(record)
            except SizeMismatchError as error:
                raise UserError(f"{error} Repair the JSON.") from None
            except UnreadableImageError as error:
                self.skips.skip(index, record["file_name"], error)
        raise UserError("no training image could be read.")


@lru_cache(maxsize=4)
def _shuffle(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def training_loader(
    cfg: CfgNode, records: list[dict[str, Any]], skips: SkipCounter, start_step: int, total_steps: int
) -> DataLoader:
    """Batches from ``start_step`` on, this process's share of each, as lists of Detectron2 inputs."""
    stream = TrainingStream(records, training_mapper(cfg), cfg.SEED, skips)
    batch, world, rank = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), comm.get_rank()
    positions = range(start_step * batch + rank, total_steps * batch, world)
    return DataLoader(
        stream,
        batch_size=batch // world,
        sampler=positions,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        generator=torch.Generator(),  # its own, so that starting workers draws nothing from the run's
    )


def training_records(dataset: str, filter_empty: bool = True) -> list[dict[str, Any]]:
    """Detectron2 dataset dicts of a registered data set, images without objects left out."""
    try:
        return get_detection_dataset_dicts(dataset, filter_empty=filter_empty)
    except AssertionError as error:
        raise UserError(f"no image with a usable annotation to train on ({error}).") from None


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


class ReadableMapper:
    """A mapper whose failure to read an image names the image: evaluation leaves none out."""

    def __init__(self, mapper: DatasetMapper):
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.mapper(record)
        except SizeMismatchError as error:
            raise UserError(f"{error} Repair the JSON.") from None
        except UnreadableImageError as error:
            name = record["file_name"]
            raise UserError(f"cannot read image {name} ({error}). Replace it, or remove it from the JSON.") from None


def evaluation_loader(cfg: CfgNode, dataset: str) -> DataLoader:
    """Every image of a registered data set once, this process's share."""
    return build_detection_test_loader(
        get_detection_dataset_dicts(dataset, filter_empty=False),
        mapper=ReadableMapper(inference_mapper(cfg)),
        batch_size=max(1, min(8, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
