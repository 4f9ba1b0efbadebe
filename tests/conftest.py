"""Fixtures of all tests: the tools folder on the path, small sample data, where real data would be."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, long before a kernel test runs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process ends with one alone."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory):
    """The sample data set at its smallest: 24 + 8 scenes, 96 + 48 images of objects and relations."""
    from make_sample_data import make_sample_data

    return make_sample_data(tmp_path_factory.mktemp("data") / "sample", seed=0, scenes=(24, 8), objects=(6, 3))


@pytest.fixture(scope="session")
def real_data():
    """The folder with real images, for tests on them: KARVIS_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("KARVIS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set KARVIS_DATA")
    return folder
