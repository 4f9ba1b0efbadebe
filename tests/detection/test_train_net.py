"""Does the command train by paths alone, on real photographs too, and end with one message on bad input?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_detector import TINY
from train_net import main

from backbones.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KARAT = ["--config", str(ROOT / "detection/vitdet_karat.yaml"), "--size", "nano"]


def train_net(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/train_net.py"), *arguments]
    env = {**os.environ, "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs or none")
def test_command_trains_in_two_processes(paths, tmp_path):
    done = train_net(*KARAT, "--output", str(tmp_path / "run"), "--num-gpus", "2", *paths, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("peak learning rate") == 1
    assert json.loads((tmp_path / "run/metrics.json").read_text())["parameters"] > 0


def test_bad_input_ends_with_one_message_and_code_2(tmp_path):
    done = train_net("--config-file", "detection/vitdet_karat.yml", "OUTPUT_DIR", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: config detection/vitdet_karat.yml does not exist")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOLVER.EPOHCS", "1"], "'EPOCHS'"),
        (["--num-machines", "2"], "--dist-url"),
        (["--num-gpus", "0"], "--num-gpus is 0"),
        (["--eval-only"], "TEST_JSON is not set|does not exist"),
        (["--resume"], "nothing to resume"),
        ([], r"DATASETS\.TEST_JSON is not set"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([*KARAT, "--output", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_options_may_stand_before_and_after_the_keys(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        main([*KARAT, "SOLVER.EPOCHS", "1", "--resume", "--output", str(tmp_path / "run"), "SEED", "1"])


def test_real_photographs_train_and_evaluate_by_path_alone(real_data, tmp_path):
    coco = real_data / "coco_mini"
    data = [
        *("DATASETS.TRAIN_JSON", f"{coco}/annotations/instances_train2017.json"),
        *("DATASETS.TRAIN_IMAGES", f"{coco}/train2017"),
        *("DATASETS.TEST_JSON", f"{coco}/annotations/instances_val2017.json"),
        *("DATASETS.TEST_IMAGES", f"{coco}/val2017"),
    ]
    main([*KARAT, "--output", str(tmp_path / "run"), *data, "SOLVER.EPOCHS", "0.15", "MODEL.DEVICE", "cpu"])
    figures = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(figures["box_ap_per_class"]) == 80
    assert 0 <= figures["mask_ap50"] <= 100
