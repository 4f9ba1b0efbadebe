"""Is every problem with a COCO JSON or its images named before training starts?"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from backbones.utils.errors import UserError
from detection.datasets import register_datasets
from detection.loader import training_mapper, training_records


@pytest.fixture
def broken(tiny, sample_data, tmp_path):
    """Changes a copy of the training JSON and returns the config that points to it."""

    def make(change, *overrides: str, split: str = "TRAIN"):
        name = "train" if split == "TRAIN" else "val"
        dataset = json.loads((sample_data / f"detection/annotations/{name}.json").read_text())
        change(dataset)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(dataset))
        return tiny(f"DATASETS.{split}_JSON", str(path), *overrides)

    return make


def drop_masks(dataset):
    for annotation in dataset["annotations"]:
        annotation.pop("segmentation")


def test_classes_and_their_number_come_from_the_json(tiny):
    cfg = tiny()
    training, test = register_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    assert training.classes == test.classes
    assert training.classes[:2] == ["disc", "square"]
    assert training.images == 24
    labels = {a["category_id"] for r in DatasetCatalog.get(training.name) for a in r["annotations"]}
    assert labels <= set(range(10))


def test_rle_masks_choose_bitmasks_and_are_decoded(tiny):
    cfg = tiny()
    training, _ = register_datasets(cfg)
    assert training.has_rle
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    record = next(
        r for r in training_records(training.name) if any(isinstance(a["segmentation"], dict) for a in r["annotations"])
    )
    instances = training_mapper(cfg)(record)["instances"]
    assert instances.gt_masks.tensor.flatten(1).any(1).all()


def test_polygons_alone_stay_polygons(broken):
    def change(dataset):
        for annotation in dataset["annotations"]:
            x, y, w, h = annotation["bbox"]
            if not annotation["iscrowd"]:
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]

    cfg = broken(change)
    training, _ = register_datasets(cfg)
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    assert len(training_mapper(cfg)(training_records(training.name)[0])["instances"]) > 0


def test_crowds_are_no_training_target(tiny):
    cfg = tiny()
    training, _ = register_datasets(cfg)
    record = next(r for r in training_records(training.name) if any(a["iscrowd"] for a in r["annotations"]))
    np.random.seed(0)
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 1.0
    instances = training_mapper(cfg)(copy.deepcopy(record))["instances"]
    assert len(instances) == sum(not a["iscrowd"] for a in record["annotations"])


def test_boxes_alone_need_masks_off(broken):
    with pytest.raises(UserError, match=r"no mask.*MODEL\.MASK_ON False"):
        register_datasets(broken(drop_masks))
    training, _ = register_datasets(broken(drop_masks, "MODEL.MASK_ON", "False"))
    assert training.images == 24


def set_first(**values):
    def change(dataset):
        dataset["annotations"][0].update(values)

    return change


def remove(*keys):
    def change(dataset):
        for key in keys:
            dataset.pop(key)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("categories"), "no list of categories"),
        (remove("annotations"), "no list of annotations"),
        (lambda d: d.update(images=[]), "lists no images"),
        (set_first(category_id=77), r"category_id 77.*1, 2, 3, 5"),
        (set_first(image_id=999), "image 999"),
        (set_first(bbox=[1, 2]), r"x, y, width, height"),
        (set_first(id=2), "must be unique"),
        (lambda d: d["annotations"][1].pop("bbox"), "annotation number 1 has no 'bbox'"),
        (lambda d: d["images"][2].pop("height"), "image number 2 has no 'height'"),
        (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "crowd annotations only"),
        (lambda d: d["images"][0].update(file_name="gone.jpg"), r"1 of 24 images.*gone\.jpg"),
    ],
)
def test_each_problem_of_a_json_is_named(broken, change, message):
    with pytest.raises(UserError, match=message):
        register_datasets(broken(change))


def test_a_json_that_is_no_dataset_is_refused(tiny, tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a COCO dataset"):
        register_datasets(tiny("DATASETS.TRAIN_JSON", str(tmp_path / "list.json")))


def test_other_classes_in_the_test_set_are_named(broken):
    def change(dataset):
        dataset["categories"][3]["name"] = "pentagon"

    with pytest.raises(UserError, match="they differ"):
        register_datasets(broken(change, split="TEST"))


def test_missing_and_empty_paths_are_named(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{")
    for overrides, message in (
        (["DATASETS.TRAIN_JSON", ""], r"DATASETS\.TRAIN_JSON is not set"),
        (["DATASETS.TRAIN_JSON", str(tmp_path / "no.json")], "does not exist"),
        (["DATASETS.TRAIN_JSON", str(tmp_path / "text.json")], "not valid JSON"),
        (["DATASETS.TEST_IMAGES", str(tmp_path / "no")], "is not a folder"),
        (["DATASETS.TEST_IMAGES", str(tmp_path / "empty")], "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            register_datasets(tiny(*overrides))


def test_images_in_the_wrong_folder_are_counted(tiny, sample_data):
    with pytest.raises(UserError, match=r"24 of 24 images.*train_00000\.jpg"):
        register_datasets(tiny("DATASETS.TRAIN_IMAGES", str(sample_data / "detection/val")))


def test_a_json_that_changed_is_read_again(broken, sample_data, tmp_path):
    first, _ = register_datasets(broken(lambda d: None))
    second, _ = register_datasets(broken(lambda d: d["annotations"].pop()))
    assert second.annotations == first.annotations - 1
    assert second.name != first.name


def test_file_names_may_hold_folders(broken, sample_data, tmp_path):
    shutil.copytree(sample_data / "detection/train", tmp_path / "images/train")

    def change(dataset):
        for image in dataset["images"]:
            image["file_name"] = f"train/{image['file_name']}"

    training, _ = register_datasets(broken(change, "DATASETS.TRAIN_IMAGES", str(tmp_path / "images")))
    assert Path(DatasetCatalog.get(training.name)[0]["file_name"]).is_file()
