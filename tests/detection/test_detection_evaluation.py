"""Are the figures by class those of the class?"""

import json
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances

from detection.datasets import register_datasets
from detection.evaluation import evaluate


class Oracle(torch.nn.Module):
    """Finds 0.7 of the width of each true box of some classes, an IoU of 0.7, and nothing else."""

    def __init__(self, json_file, known):
        super().__init__()
        dataset = json.loads(Path(json_file).read_text())
        self.labels = {c["id"]: i for i, c in enumerate(sorted(dataset["categories"], key=lambda c: c["id"]))}
        self.names = {i: c["name"] for i, c in enumerate(sorted(dataset["categories"], key=lambda c: c["id"]))}
        self.truth = [a for a in dataset["annotations"] if not a["iscrowd"]]
        self.known = known

    def forward(self, inputs):
        return [{"instances": self._find(image)} for image in inputs]

    def _find(self, image):
        found = [a for a in self.truth if a["image_id"] == image["image_id"]]
        found = [a for a in found if self.names[self.labels[a["category_id"]]] in self.known]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] * torch.tensor([0.7, 1.0])
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.tensor([self.labels[a["category_id"]] for a in found], dtype=torch.long)
        return instances


@pytest.fixture
def dataset(tiny):
    cfg = tiny("MODEL.MASK_ON", "False")
    _, test = register_datasets(cfg, train=False)
    return cfg, test


def test_ap50_by_class_is_of_that_class_and_its_mean_is_ap50(dataset):
    cfg, test = dataset
    figures = evaluate(cfg, Oracle(test.json_file, {"warm", "star"}), test.name)
    by_class = figures["box_ap50_per_class"]
    present = {name: value for name, value in by_class.items() if value is not None}
    assert list(by_class) == test.classes
    assert present["warm"] == pytest.approx(100, abs=0.1)
    assert figures["box_ap_per_class"]["warm"] < 60  # nothing is found at an IoU above 0.7
    assert {value for name, value in present.items() if name not in ("warm", "star")} == {0.0}
    assert sum(present.values()) / len(present) == pytest.approx(figures["box_ap50"], abs=0.01)


def test_a_detector_that_finds_nothing_has_zero_by_class(dataset):
    cfg, test = dataset
    figures = evaluate(cfg, Oracle(test.json_file, set()), test.name)
    assert figures["box_ap50"] == 0.0
    assert set(figures["box_ap50_per_class"].values()) <= {0.0, None}
    assert 0.0 in figures["box_ap50_per_class"].values()
