"""Where a COCO JSON and its folder of images become Detectron2 data sets, and every problem with them is named."""

from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, shown

from .coco import check_entries, check_masks_fit

MAX_BYTES = 2**32  # of a JSON; those of COCO and LVIS have half a gigabyte and more


@dataclass(frozen=True)
class CocoSummary:
    """What a COCO JSON holds; ``name`` is its name in Detectron2's catalogs."""

    name: str
    json_file: str
    images: int
    annotations: int
    categories: tuple[tuple[int, str], ...]  # (id, name), by id
    has_rle: bool  # among the annotations that are not crowds
    digest: str  # of the JSON file

    @property
    def classes(self) -> list[str]:
        return [name for _, name in self.categories]


def register_datasets(cfg: CfgNode, train: bool = True) -> tuple[CocoSummary | None, CocoSummary]:
    """Checks and registers DATASETS.TRAIN_* and TEST_*, and sets what follows from them in ``cfg``.

    Args:
        cfg: MODEL.ROI_HEADS.NUM_CLASSES and INPUT.MASK_FORMAT are filled in.
        train: whether the training set is needed.
    Returns:
        The training set (None when not needed) and the test set.
    """
    masks, data = cfg.MODEL.MASK_ON, cfg.DATASETS
    test = _register("TEST", data.TEST_JSON, data.TEST_IMAGES, masks)
    if not train:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(test.classes)
        return None, test
    training = _register("TRAIN", data.TRAIN_JSON, data.TRAIN_IMAGES, masks)
    check_same_classes(training.categories, test.categories, training.json_file, test.json_file)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(training.classes)
    if cfg.INPUT.MASK_FORMAT is None:
        cfg.INPUT.MASK_FORMAT = "bitmask" if training.has_rle else "polygon"
    elif cfg.INPUT.MASK_FORMAT == "polygon" and training.has_rle and masks:
        raise UserError(
            f"{training.json_file} has RLE masks, which INPUT.MASK_FORMAT polygon cannot hold. Leave it out."
        )
    return training, test


def _register(split: str, json_file: str, images: str, masks: bool) -> CocoSummary:
    json_key, images_key = f"DATASETS.{split}_JSON", f"DATASETS.{split}_IMAGES"
    for key, value in ((json_key, json_file), (images_key, images)):
        if not value:
            raise UserError(f"{key} is not set. Give the path on the command line: {key} PATH")
    dataset = read_json(json_file, json_key, MAX_BYTES)
    summary = check_coco(dataset, json_file, masks)
    if split == "TEST" and not all("area" in annotation for annotation in dataset["annotations"]):
        raise UserError(f"{json_file} has annotations without an area, which COCO's evaluation needs. Add it.")
    _check_images(dataset["images"], Path(images), images_key, json_file)

    # The catalogs are global and never forget; a file that changed is another data set.
    stat = Path(json_file).stat()
    identity = f"{Path(json_file).resolve()} {Path(images).resolve()} {stat.st_mtime_ns} {stat.st_size}"
    name = f"coco_{split.lower()}_{sha1(identity.encode()).hexdigest()[:12]}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: load_coco_json(str(json_file), str(images), name))
        MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(images), evaluator_type="coco")
    digest = sha256(Path(json_file).read_bytes()).hexdigest()
    return CocoSummary(name, str(json_file), digest=digest, **summary)


def check_coco(dataset: Any, json_file: str, masks: bool) -> dict[str, Any]:
    """Checks a COCO instances dataset; returns what CocoSummary needs of it.

    Args:
        dataset: the parsed JSON.
        json_file: its path, for messages.
        masks: whether every annotation must have a mask.
    """
    if not isinstance(dataset, dict):
        raise UserError(
            f"{json_file} is a JSON {type(dataset).__name__}, not a COCO dataset with images and annotations."
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset.get(key), list):
            raise UserError(
                f"{json_file} has no list of {key}. Give a COCO instances JSON (images, annotations, categories)."
            )
        if not dataset[key]:
            raise UserError(f"{json_file} lists no {key}. Give a JSON that does.")
    check_entries(dataset, json_file)
    categories = tuple(sorted((c["id"], c["name"]) for c in dataset["categories"]))
    known, image_ids = {i for i, _ in categories}, {image["id"] for image in dataset["images"]}
    objects = [a for a in dataset["annotations"] if not a.get("iscrowd", 0)]
    if not objects:
        raise UserError(f"{json_file} has crowd annotations only; there is no object to learn or to find.")
    for annotation in dataset["annotations"]:
        where = f"annotation {annotation['id']} of {json_file}"
        if annotation["category_id"] not in known:
            ids = ", ".join(str(i) for i in sorted(known)[:12]) + (", ..." if len(known) > 12 else "")
            raise UserError(f"{where} has category_id {annotation['category_id']}; its categories are {ids}.")
        if annotation["image_id"] not in image_ids:
            raise UserError(
                f"{where} belongs to image {shown(annotation['image_id'])}, which is not in its list of images."
            )
    check_masks_fit(dataset, json_file)
    if masks:
        _check_masks(objects, json_file)
    return {
        "images": len(image_ids),
        "annotations": len(dataset["annotations"]),
        "categories": categories,
        "has_rle": any(isinstance(a.get("segmentation"), dict) for a in objects),
    }


def check_same_classes(train: Any, test: Any, train_name: str, test_name: str) -> None:
    """Raises UserError naming the first difference between two tuples of (id, name)."""
    train, test = [tuple(c) for c in train], [tuple(c) for c in test]
    if train == test:
        return
    difference = sorted(set(train) ^ set(test))
    where = train_name if difference[0] in train else test_name
    raise UserError(
        f"{train_name} has {len(train)} categories and {test_name} has {len(test)}, and they differ: "
        f"id {difference[0][0]}, {difference[0][1]!r}, is in {where} only. Both files must list the same categories."
    )


def _check_masks(objects: list[dict[str, Any]], json_file: str) -> None:
    without = [a for a in objects if not a.get("segmentation")]
    if without:
        raise UserError(
            f"{len(without)} of {len(objects)} annotations of {json_file} have no mask (first: id {without[0]['id']}). "
            "Train boxes alone with MODEL.MASK_ON False, or give a JSON with segmentation."
        )


def _check_images(images: list[dict[str, Any]], folder: Path, key: str, json_file: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder. Check the path.")
    present = {path.name for path in folder.iterdir()}
    if not present:
        raise UserError(f"{key}: {folder} is empty. Give the folder with the images of {json_file}.")
    names, root = [image["file_name"] for image in images], folder.resolve()
    outside = [name for name in names if ".." in name and not (folder / name).resolve().is_relative_to(root)]
    if outside:
        raise UserError(f"{json_file} names the image {shown(outside[0])}, outside {folder}. Repair the file.")
    missing = [name for name in names if name not in present and not ("/" in name and (folder / name).is_file())]
    if missing:
        first = ", ".join(missing[:3])
        raise UserError(
            f"{len(missing)} of {len(names)} images of {json_file} are not in {folder} (first: {first}). "
            f"Set {key} to the folder that holds them."
        )
