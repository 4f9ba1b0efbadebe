"""The ADE20K layout by path: classes, labels, reproducible samples, and every kind of bad file."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmseg.registry import DATASETS
from PIL import Image

from backbones.utils.errors import UserError
from segmentation.datasets import PositionedSampler, class_metainfo


@pytest.fixture
def data(ade_layout, tmp_path):
    """A copy of the sample data that a test may damage."""
    return shutil.copytree(ade_layout, tmp_path / "data")


def build(make_config, root, split="training"):
    cfg = make_config(options={"data_root": str(root), "val_dataloader.dataset.indices": None})
    return DATASETS.build((cfg.train_dataloader if split == "training" else cfg.val_dataloader).dataset)


def first(root, kind, split="training"):
    return sorted((root / kind / split).iterdir())[0]


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


def test_class_names_come_from_the_json_file_else_from_ade20k(ade_layout, tmp_path):
    assert class_metainfo(ade_layout)["classes"] == json.loads((ade_layout / "classes.json").read_text())
    assert len(class_metainfo(tmp_path)["classes"]) == 150


def test_mask_value_k_becomes_label_k_minus_1_and_0_is_ignored(make_config, ade_layout):
    dataset = build(make_config, ade_layout, "validation")
    sample = dataset[0]["data_samples"]
    mask = np.array(Image.open(sample.seg_map_path)).astype(int)
    expected = np.where(mask == 0, 255, mask - 1)
    np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), expected)
    assert (mask == 0).any()


def test_a_sample_depends_on_its_position_and_nothing_else(make_config, ade_layout):
    dataset = build(make_config, ade_layout)
    once = dataset[3, 7]["inputs"]
    np.random.rand(5)
    torch.rand(5)
    assert torch.equal(dataset[3, 7]["inputs"], once)
    assert not torch.equal(dataset[3, 8]["inputs"], once)


def test_sampler_continues_where_it_stopped():
    sampler = PositionedSampler(range(5), seed=0)
    whole = [pair for pair, _ in zip(sampler, range(12), strict=False)]
    rest = PositionedSampler(range(5), seed=0)
    rest.skip(7)
    assert [pair for pair, _ in zip(rest, range(5), strict=False)] == whole[7:]


def test_missing_folder_is_named(make_config, tmp_path):
    with pytest.raises(UserError, match=r"images/training does not exist.*data_root"):
        build(make_config, tmp_path / "nowhere")


def test_empty_folder_is_named(make_config, data):
    shutil.rmtree(data / "images" / "training")
    (data / "images" / "training").mkdir()
    with pytest.raises(UserError, match="images/training holds no image"):
        build(make_config, data)


def test_image_without_a_mask_is_named(make_config, data):
    first(data, "annotations").unlink()
    with pytest.raises(UserError, match=r"train_00000\.jpg has no mask"):
        build(make_config, data)


@pytest.mark.parametrize("value", [12, 254])
def test_mask_value_outside_the_classes_is_named_at_start(make_config, data, value):
    path = first(data, "annotations")
    mask = np.array(Image.open(path))
    mask[0, 0] = value
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=rf"train_00000\.png holds the value {value}; allowed are .*1 to 11"):
        build(make_config, data)


def test_16_bit_mask_does_not_wrap_around(make_config, data):
    path = first(data, "annotations")
    Image.fromarray(np.array(Image.open(path)).astype(np.uint16) + 256).save(path)
    with pytest.raises(UserError, match=r"holds the value 2[56]\d;"):
        build(make_config, data)


def test_every_mask_is_checked_when_it_is_read(make_config, data):
    dataset = build(make_config, data)
    path = first(data, "annotations")
    Image.fromarray(np.full((128, 128), 77, np.uint8)).save(path)
    with pytest.raises(UserError, match="holds the value 77"):
        dataset[0]


def test_coloured_mask_is_refused(make_config, data):
    path = first(data, "annotations")
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(UserError, match="has 3 channels"):
        build(make_config, data)


def test_mask_of_another_size_is_refused(make_config, data):
    path = first(data, "annotations")
    Image.open(path).crop((0, 0, 100, 90)).save(path)
    with pytest.raises(UserError, match=r"is 100x90, its image .* is 128x128"):
        build(make_config, data)[0]


@pytest.mark.parametrize(
    "text", ["{}", "[]", '["a", "a"]', '["a", 3]', "[1", json.dumps([f"c{i}" for i in range(255)])]
)
def test_broken_class_names_are_refused(data, text):
    (data / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        class_metainfo(data)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_truncated_training_file_is_named_skipped_and_counted(make_config, data, kind, capsys):
    truncate(first(data, kind))
    dataset = build(make_config, data)
    assert dataset[0, 0]["data_samples"].img_path.endswith("train_00001.jpg")
    dataset[0, 1]
    assert dataset.skips.count == 1
    assert capsys.readouterr().err.count("train_00000.jpg") == 1


def test_more_than_one_percent_of_truncated_training_images_ends_the_run(make_config, data):
    for path in sorted((data / "images" / "training").iterdir())[:2]:
        truncate(path)
    dataset = build(make_config, data)
    with pytest.raises(UserError, match="2 of 24 training images are unreadable"):
        dataset[0, 0]


def test_truncated_validation_image_is_an_error(make_config, data):
    truncate(first(data, "images", "validation"))
    with pytest.raises(UserError, match=r"cannot read the image .*val_00000\.jpg"):
        build(make_config, data, "validation")[0]
