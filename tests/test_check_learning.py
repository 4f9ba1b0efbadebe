"""The test of continuous integration that every family learns: what it lets pass, and what not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from check_learning import check

from backbones.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def figure(**by_seed):
    return {"by_seed": {seed.removeprefix("s"): value for seed, value in by_seed.items()}}


def results(**rows):
    """rows: name to (top-1, box AP50) by seed, "control" first for a control."""
    made = {}
    for name, (control, top1, ap50) in rows.items():
        figures = {"classification.top1": figure(**top1), "detection.box_ap50": figure(**ap50)}
        made[name] = {"name": name, "control": control, "figures": figures}
    return {"rows": made, "baselines": {"classification.top1": 10.0}}


VIT = (None, {"s0": 60.0, "s1": 62.0}, {"s0": 40.0, "s1": 50.0})


def test_lets_pass_what_has_learned_on_every_seed_and_any_control():
    karat = (None, {"s0": 30.0, "s1": 55.0}, {"s0": 28.0, "s1": 35.0})
    assert check(results(vit=VIT, karat=karat, uniform=("attention", {"s0": 1.0}, {"s0": 0.0}))) == []


def test_names_each_figure_and_seed_that_falls_short():
    karat = (None, {"s0": 29.9, "s1": 55.0}, {"s0": 28.0, "s1": 34.9})
    wrong = check(results(vit=VIT, karat=karat))
    assert wrong == [
        "karat, seed 0: classification.top1 is 29.9; 3 times chance is 30.0",
        "karat, seed 1: detection.box_ap50 is 34.9; 0.7 times vit's is 35.0",
    ]
    nan = float("nan")
    assert len(check(results(vit=VIT, karat=(None, {"s0": nan}, {"s0": nan})))) == 4  # of both seeds


@pytest.mark.parametrize("missing", ["vit", "classification.top1", "detection.box_ap50"])
def test_refuses_to_judge_what_is_not_there(missing):
    made = results(vit=VIT, karat=VIT)
    if missing == "vit":
        del made["rows"]["vit"]
    else:
        del made["rows"]["karat"]["figures"][missing]
    with pytest.raises(UserError, match=missing):
        check(made)


def test_the_command_fails_and_says_why(tmp_path):
    karat = (None, {"s0": 20.0, "s1": 55.0}, {"s0": 28.0, "s1": 36.0})
    (tmp_path / "results.json").write_text(json.dumps(results(vit=VIT, karat=karat)))
    command = [sys.executable, ROOT / "tools" / "check_learning.py", tmp_path]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert "karat, seed 0: classification.top1 is 20.0" in run.stderr
