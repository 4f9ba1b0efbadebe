"""Reading an image and its mask, with every value checked as it enters."""

from typing import Any

import numpy as np
from mmcv.image.io import _pillow2array
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image

from backbones.training.images import MAX_PIXELS, read_image
from backbones.utils.errors import UserError

IGNORE = 255  # mmseg's label of pixels that count neither in the loss nor in the metrics
MAX_CLASSES = 254


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """mmcv's loader on pillow, which refuses a truncated file; OpenCV fills it with grey without a word.

    Args:
        max_pixels: images of more are not decoded.
        to_float32, color_type: mmcv's.

    Raises:
        UnreadableImageError: when the file cannot be decoded.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, to_float32: bool = False, color_type: str = "color"):
        super().__init__(to_float32=to_float32, color_type=color_type, imdecode_backend="pillow")
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        image = read_image(results["img_path"], self._decode, self.max_pixels, "max_pixels")
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def _decode(self, image: Image.Image) -> np.ndarray:
        return _pillow2array(image, self.color_type)


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(LoadAnnotations):
    """mmseg's mask loader; a mask of another size, with colours or with values outside the classes is an error.

    Args:
        max_pixels: masks of more are not decoded.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, **kwargs: Any):
        super().__init__(**kwargs)
        self.max_pixels = max_pixels

    def _load_seg_map(self, results: dict) -> None:
        mask = read_mask(results["seg_map_path"], results["num_classes"], self.max_pixels)
        if mask.shape != tuple(results["ori_shape"]):
            (height, width), (image_height, image_width) = mask.shape, results["ori_shape"]
            raise UserError(
                f"the mask {results['seg_map_path']} is {width}x{height}, its image {results['img_path']} is "
                f"{image_width}x{image_height}. Both must have the same size."
            )
        labels = mask.astype(np.int16) - 1  # value 0 is unlabelled
        results["gt_seg_map"] = np.where((mask == 0) | (mask == IGNORE), IGNORE, labels).astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")


def read_mask(path: str, num_classes: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values (H, W) of a mask file: 0 unlabelled, 1 to ``num_classes`` the classes, 255 ignored.

    Raises:
        UnreadableImageError: for a file that cannot be decoded.
        UserError: for a mask with several channels or other values.
    """
    mask = read_image(path, np.array, max_pixels, "max_pixels")
    if mask.ndim != 2:
        raise UserError(
            f"the mask {path} has {mask.shape[-1]} channels; a mask has one, whose values are class numbers. "
            "Convert colours to class numbers first."
        )
    if mask.dtype.kind == "f":
        raise UserError(f"the mask {path} holds fractions; a mask holds class numbers. Save it with 8 bits per pixel.")
    wrong = (mask > num_classes) & (mask != IGNORE)
    if mask.dtype.kind == "i":
        wrong |= mask < 0
    if wrong.any():
        raise UserError(
            f"the mask {path} holds the value {int(mask[wrong][0])}; allowed are 0 (unlabelled), 1 to {num_classes} "
            f"(the classes) and {IGNORE} (ignored). Correct the mask, or list all classes in classes.json."
        )
    return mask
