"""COCO JSON of strangers: every field is checked before pycocotools or Detectron2 computes with it."""

# ruff: noqa: E501 - the lists of values
import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hostile import refused

from backbones.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


def dataset():
    """One image of 40x30 pixels with a polygon, a compressed mask and a crowd."""
    from pycocotools import mask

    square = np.zeros((30, 40), np.uint8, order="F")
    square[3:9, 4:20] = 1
    counts = mask.encode(square)["counts"].decode()
    common = {"image_id": 1, "category_id": 1, "bbox": [4, 3, 16, 6], "area": 96, "iscrowd": 0}
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, **common, "segmentation": [[4, 3, 20, 3, 20, 9, 4, 9]]},
            {"id": 2, **common, "segmentation": {"size": [30, 40], "counts": counts}},
            {"id": 3, **common, "iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [100, 50, 1050]}},
        ],
    }


def check(values):
    from detection.datasets import check_coco

    return check_coco(values, "x.json", True)


def test_good_one_passes():
    assert check(dataset())["annotations"] == 3


IDS = [True, NAN, INF, 1.5, None, [1], {}, 2**60, -(2**60)]
FIELDS = [
    *(("images", "id", value) for value in (*IDS, "x" * 1000)),
    *(("images", "height", value) for value in (0, -1, "30", 30.0, NAN, True, None, [30], 2**40)),
    *(("images", "width", value) for value in (0, 10**9, "40", None)),
    *(
        ("images", "file_name", value)
        for value in (5, None, "", ["a"], {}, "../a.png", "b/../../a.png", "/etc/passwd", "a\0.png", "\x1b[31m.png",
                      "\ud800.png", "a\n.png", "x" * 10**5, "../../../../../../etc/passwd", "\u202e.png", True)
    ),
    *(("categories", "id", value) for value in (*IDS, "1")),
    *(("categories", "name", value) for value in (5, None, "", [], "\x1b[2Jcat", "a\rb", "\ud800", "x" * 10**4, "dog")),
    *(("annotations", "id", value) for value in (*IDS, "1", 2)),
    *(("annotations", "image_id", value) for value in (*IDS, 7, "1")),
    *(("annotations", "category_id", value) for value in (*IDS, 7, "1")),
    *(
        ("annotations", "bbox", value)
        for value in (None, 5, "abcd", [], [1, 2, 3], [1, 2, 3, NAN], [1, 2, INF, 3], [1, 2, -3, 4], [1, 2, "3", 4], [[1], 2, 3, 4],
                      [1, 2, True, 4], [10**30, 0, 1, 1], [1e300, 0, 1, 1], {"x": 1}, [1] * 10**5)
    ),
    *(("annotations", "iscrowd", value) for value in (2, -1, "0", None, NAN, [0], 0.5)),
    *(("annotations", "area", value) for value in (NAN, INF, -1, "9", None, [9], True, 1e300)),
    *(("annotations", "ignore", value) for value in (1, "yes", [1])),
    *(("annotations", "keypoints", value) for value in (5, "abc", ["a"], [NAN, 1, 1])),
    *(
        ("annotations", "segmentation", value)
        for value in (5, "text", True, [5], ["abcdef"], [[1, 2, 3, 4]], [[]], [[1, 2, 3, 4, 5, 6, 7]], [[NAN] * 8], [[INF] * 6],
                      [[1, 2, 3, 4, 5, "6"]], [[[1, 2], [3, 4], [5, 6]]], [[10**30] * 6], [[1e18] * 6], [[True] * 6],
                      [[0, 0, 2**20, 0, 0, 2**20] * 10**4], [[1, 2, 3, 4, 5, 6], 7], [{"size": [30, 40]}], {}, {"size": [30, 40]})
        if value != {}
    ),
    *(
        ("annotations", "segmentation", {"size": size, "counts": counts})
        for size, counts in (
            ([100000, 100000], "0"), ([40, 30], [1200]), ([30, 40, 1], [1200]), ([30.0, 40.0], [1200]), (["30", "40"], [1200]),
            ([True, 40], [1200]), (None, [1200]), (5, [1200]), ([-30, -40], [1200]), ([30, 40], [1199]), ([30, 40], [1201]),
            ([30, 40], [-5, 1205]), ([30, 40], [10**30]), ([30, 40], [1200.0]), ([30, 40], [True] * 1200), ([30, 40], []),
            ([30, 40], None), ([30, 40], 5), ([30, 40], {}), ([30, 40], ""), ([30, 40], "0"), ([30, 40], "PPPPPPPPPPPPYZ1O2N3" * 50),
            ([30, 40], "\x00"), ([30, 40], "ünicode"), ([30, 40], "o" * 10**6), ([30, 40], "0" * 10**6), ([30, 40], "P"),
            ([30, 40], "\ud800"), ([30, 40], [["0"]]), ([30, 40], "`" * 9),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("part", "field", "value"), FIELDS, ids=lambda value: ascii(value)[:24])
def test_field(part, field, value):
    values = dataset()
    values[part][0][field] = value
    started = time.monotonic()
    with refused():
        check(values)
    assert time.monotonic() - started < 5


SHAPES = [None, [], 5, "text", {"images": 5}, {**dataset(), "images": {}}, {**dataset(), "annotations": [5]}, {**dataset(), "images": [None]},
          {**dataset(), "categories": [[1]]}, {**dataset(), "annotations": [[]]}, {**dataset(), "categories": []}]  # fmt: skip


@pytest.mark.parametrize("values", SHAPES, ids=lambda value: str(value)[:30])
def test_shape(values):
    with refused():
        check(values)


def test_duplicates():
    for part in ("images", "categories", "annotations"):
        values = dataset()
        values[part].append(copy.deepcopy(values[part][0]))
        with refused("appears twice"):
            check(values)


def test_run_lengths_are_read_as_pycocotools_writes_them():
    from pycocotools import mask

    from detection.coco import rle_counts

    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        pixels = np.asfortranarray(rng.random((height, width)) < rng.random()).astype(np.uint8)
        text = mask.encode(pixels)["counts"].decode()
        counts = rle_counts(text, height * width)
        again = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        assert again["counts"].decode() == text
        assert rle_counts(text, height * width + 1) is None


def compressed(counts):
    """COCO's text of run lengths, also of those that no image has."""
    text = ""
    for place, count in enumerate(counts):
        left = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            part, left = left & 31, left >> 5
            more = left != (-1 if part & 16 else 0)
            text += chr(48 + part + 32 * more)
    return text


def test_run_lengths_below_nothing_or_past_the_image():
    from detection.coco import rle_counts

    assert rle_counts(compressed([100, 50, 1050]), 1200) == [100, 50, 1050]
    for counts in ([1300, -100], [0, 2**40, -(2**40) + 1200], [100, 50, 1051], [-1, 1201], [2400, 0, -1200]):
        assert rle_counts(compressed(counts), 1200) is None


def test_mutated_datasets_are_taken_or_refused(tmp_path):
    from pycocotools import mask

    from backbones.utils.documents import parse_json
    from detection.datasets import check_coco

    raw, rng, taken = json.dumps(dataset()), random.Random(0), 0
    for _ in range(400):
        data = list(raw)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[rng.randrange(len(data))] = rng.choice('0123456789-.e[]{}",: PYZ`o')
        try:
            values = parse_json("".join(data), "x.json")
            check_coco(values, "x.json", True)
        except UserError:
            continue
        taken += 1
        size = (values["images"][0]["height"], values["images"][0]["width"])
        for annotation in values["annotations"]:
            found = annotation.get("segmentation")
            if found and np.prod(size) < 10**6:
                encoded = (
                    found
                    if isinstance(found, dict) and isinstance(found["counts"], str)
                    else mask.frPyObjects(found, *size)
                )
                mask.decode(encoded)
    assert taken > 20


def test_memory_of_run_lengths_is_bounded(tmp_path):
    """The seventy bytes that took ten gigabytes, as a run would read them."""
    values = dataset()
    values["annotations"][1]["segmentation"] = {"size": [100000, 100000], "counts": "0"}
    (tmp_path / "x.json").write_text(json.dumps(values))
    code = f"""
import resource
from detection.datasets import _register
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
_register("TRAIN", {str(tmp_path / "x.json")!r}, {str(tmp_path)!r}, True)"""
    env = {**os.environ, "PYTORCH_JIT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False
    )
    assert "UserError" in done.stderr and "height and width" in done.stderr


@pytest.mark.parametrize("name", ["../outside.png", "link/../../outside.png", "link/outside.png"])
def test_names_that_leave_the_folder(name, tmp_path):
    from detection.datasets import _check_images

    (tmp_path / "outside.png").touch()
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/link").symlink_to(tmp_path / "images/sub")
    with refused():
        _check_images([{"file_name": name}], tmp_path / "images", "DATASETS.TRAIN_IMAGES", "x.json")


def test_evaluation_needs_areas(tmp_path):
    from detection.datasets import _register

    values = dataset()
    del values["annotations"][0]["area"]
    (tmp_path / "a.png").touch()
    (tmp_path / "x.json").write_text(json.dumps(values))
    with refused("without an area"):
        _register("TEST", str(tmp_path / "x.json"), str(tmp_path), True)
