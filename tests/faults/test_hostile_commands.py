"""Hostile input given to the commands themselves: one message, exit code 2, nothing run, within a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hostile_coco import dataset
from test_hostile_models import Runs
from test_hostile_settings import bomb

ROOT = Path(__file__).resolve().parents[2]


def of_classification(folder, sample_data):
    (folder / "x.yaml").write_text(f"data:\n  mean: {bomb()}\n")
    return ["pretrain_cls.py", "--config", folder / "x.yaml", f"data.root={sample_data / 'classification'}"], "aliases"


def of_detection(folder, sample_data):
    values = dataset()
    values["images"][0]["file_name"] = "\x1b[31m/../../../etc/passwd"
    (folder / "x.json").write_text(json.dumps(values))
    data = ["DATASETS.TRAIN_JSON", folder / "x.json", "DATASETS.TRAIN_IMAGES", folder]
    data += ["DATASETS.TEST_JSON", folder / "x.json", "DATASETS.TEST_IMAGES", folder]
    return ["train_net.py", "--config", ROOT / "detection/vitdet_karkat.yaml", "--size", "nano", *data], "file_name"


def of_segmentation(folder, sample_data):
    torch.save({"state_dict": {}, "x": Runs(folder / "MARK")}, folder / "evil.pth")
    init = f"dict(type='Pretrained', checkpoint='{folder / 'evil.pth'}')"
    base = ROOT / "segmentation/configs/upernet_karkat.py"
    (folder / "x.py").write_text(f"_base_ = '{base}'\nmodel = dict(decode_head=dict(init_cfg={init}))\n")
    options = ["--cfg-options", f"data_root={sample_data / 'segmentation'}", "schedule.max_iters=1"]
    return [
        "train_seg.py",
        folder / "x.py",
        "--size",
        "nano",
        "--work-dir",
        folder / "run",
        *options,
    ], "more than tensors"


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_classification, of_detection, of_segmentation], ids=lambda make: make.__name__)
def test_command(make, sample_data, tmp_path):
    (script, *arguments), message = make(tmp_path, sample_data)
    command = [sys.executable, ROOT / "tools" / script, *arguments]
    env = {**os.environ, "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert "defect" not in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert not (tmp_path / "MARK").exists()
