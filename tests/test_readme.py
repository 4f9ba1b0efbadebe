"""Every command and every Python example of the README runs, in order, on little data and for an epoch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = ("backbones", "classification", "detection", "segmentation", "tools", "docs", "Makefile", "README.md")
# What makes a command short; its words are otherwise the README's.
SHORTER = {
    "tools/make_sample_data.py": [
        "--scenes-train",
        "24",
        "--scenes-val",
        "8",
        "--objects-train",
        "12",
        "--objects-val",
        "6",
    ],
    "tools/pretrain_cls.py": ["train.epochs=1", "train.warmup_epochs=0", "train.batch_size=16"],
    "tools/train_net.py": ["SOLVER.EPOCHS", "1.0"],
    "tools/train_seg.py": ["schedule.epochs=1", "schedule.val_epochs=1"],
    "tools/run_suite.py": ["--quick", "--seeds", "1"],
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like a clone, so that runs/ and data/ of the real one stay untouched."""
    folder = tmp_path_factory.mktemp("clone")
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(line, folder):
    words = shlex.split(line)
    tool = next((word for word in words if word in SHORTER), None)
    if words[0] == "make":  # what the target would do; CI and the other tests do it
        words = ["make", "-n", *words[1:]]
    elif words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29643", *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    words += SHORTER.get(tool, []) if "--eval-only" not in words else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_JIT": "0"}
    result = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, f"{line}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"


def test_it_starts_with_the_two_commands():
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.slow
def test_every_command_runs_in_order(checkout):
    for line in commands():
        run(line, checkout)
    assert (checkout / "runs" / "mine" / "report.html").stat().st_size > 50_000


def test_every_python_example_runs(checkout):
    for block in blocks("python"):
        run(shlex.join(["python", "-c", block]), checkout)


def test_files_and_pictures_it_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
