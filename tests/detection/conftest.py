"""A detector small enough to train within seconds, and the paths of the sample scenes."""

import os

os.environ.setdefault("PYTORCH_JIT", "0")  # Detectron2 scripts small functions on import, slowly

import pytest
from tiny_detector import CONFIGS, TINY

from detection.config import load_config


@pytest.fixture(scope="session")
def paths(sample_data) -> list[str]:
    """DATASETS.* of the sample scenes, as on a command line."""
    folder = sample_data / "detection"
    return [
        *("DATASETS.TRAIN_JSON", f"{folder}/annotations/train.json", "DATASETS.TRAIN_IMAGES", f"{folder}/train"),
        *("DATASETS.TEST_JSON", f"{folder}/annotations/val.json", "DATASETS.TEST_IMAGES", f"{folder}/val"),
    ]


@pytest.fixture
def tiny(paths, tmp_path):
    """Makes a tiny config that writes to ``tmp_path / name``."""

    def make(*overrides: str, family: str = "softmax", name: str = "run"):
        output = ["OUTPUT_DIR", str(tmp_path / name)]
        return load_config(CONFIGS / f"vitdet_{family}.yaml", "nano", [*paths, *TINY, *output, *overrides])

    return make
