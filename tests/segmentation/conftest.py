"""The nano config on the smallest data: what the tests of segmentation train."""

import pytest


@pytest.fixture(scope="session")
def ade_layout(sample_data):
    """The sample data in the ADE20K layout."""
    return sample_data / "segmentation"


@pytest.fixture(scope="session")
def build_config(ade_layout):
    """``build_config(name, work_dir, options)``: 64-pixel crops, four iterations of two images."""
    from segmentation.config import CONFIG_FOLDER, load_config

    def build(name, work_dir, options=None):
        small = {
            "data_root": str(ade_layout),
            "crop_size": 64,
            "schedule.max_iters": 4,
            "schedule.val_epochs": 0.16,  # of 24 images: after every second iteration
            "train_dataloader.batch_size": 2,
            "val_dataloader.dataset.indices": 2,
            "log_interval": 1,
        }
        return load_config(CONFIG_FOLDER / f"upernet_{name}.py", "nano", small | (options or {}), work_dir)

    return build


@pytest.fixture
def make_config(build_config, tmp_path):
    """``make_config(name, folder, options)``: the same, with its outputs in this test's folder."""
    return lambda name="softmax", folder="run", options=None: build_config(name, tmp_path / folder, options)
