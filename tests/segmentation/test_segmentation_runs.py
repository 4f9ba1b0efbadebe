"""Whole runs through mmengine's Runner: what they write, resuming, evaluating, predicting, and bad input."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from PIL import Image
from safetensors.torch import load_file

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.training.folder import CHECKPOINT
from backbones.training.log import read_metrics
from backbones.training.measure import images_per_second
from backbones.utils.errors import UserError, run_main
from segmentation import engine
from segmentation.config import CONFIG_FOLDER, plan_training
from segmentation.engine import evaluate, predict, train


@HOOKS.register_module(force=True)
class InterruptHook(Hook):
    """Ends a run after iteration ``after``, as a machine that goes away would."""

    after = 3

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def quick_measurements():
    """The time of one forward pass is no part of what these tests hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "images_per_second", partial(images_per_second, seconds=0.0))
        yield


@pytest.fixture(scope="module")
def trained(build_config, tmp_path_factory):
    """A finished run that started from a classification checkpoint: its folder and metrics."""
    folder = tmp_path_factory.mktemp("trained")
    save_backbone(folder / "cls.safetensors", create_backbone("karkat_nano_patch8_64", num_classes=8))
    cfg = build_config("karkat", folder / "run", {"model.backbone.weights": str(folder / "cls.safetensors")})
    return folder / "run", train(cfg)


def test_a_run_writes_metrics_weights_log_and_provenance(trained, capsys):
    folder, metrics = trained
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for name in ("miou", "macc", "aacc", "miou_most_frequent_class", "gflops", "images_per_s", "train_images_per_s"):
        assert np.isfinite(metrics[name])
    assert metrics["skipped_images"] == 0
    assert next(iter(metrics["iou_per_class"])) == "background"
    assert metrics["parameters"] == pytest.approx(
        sum(t.numel() for t in load_file(folder / "model.safetensors").values()), rel=0.01
    )
    rows = read_metrics(folder / "metrics.jsonl")
    assert {r["step"] for r in rows if r["split"] == "train" and r["name"] == "loss"} == {1, 2, 3, 4}
    assert {r["step"] for r in rows if r["name"] == "miou"} == {2, 4}
    names = [r["name"] for r in rows]
    assert names.count("grad_norm") == names.count("grad_norm_max") == names.count("blocks.5.attn/step") == 4
    assert rows[0]["epoch"] == pytest.approx(2 / 24)
    run = json.loads((folder / "run.json").read_text())
    assert run["data_protocol"]["iterations"] == 4 and run["seed"] == 0 and run["config"]["crop_size"] == 64
    assert list((folder / "tensorboard").iterdir())


def test_weights_alone_give_the_same_evaluation_and_predictions(trained, make_config, ade_layout):
    folder, metrics = trained
    again = evaluate(make_config("karkat", options={"load_from": str(folder / "model.safetensors")}))
    assert again["miou"] == metrics["miou"]
    image = sorted((ade_layout / "images" / "validation").iterdir())[0]
    (prediction,) = predict(folder, [image])
    assert prediction.shape == Image.open(image).size[::-1] and prediction.dtype == np.uint8
    assert prediction.min() >= 1 and prediction.max() <= 9


def test_checkpoints_hold_only_tensors_and_plain_values(trained):
    folder, _ = trained
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    assert state["meta"]["iter"] == 4 and "optimizer" in state


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_one_in_one_piece(make_config, tmp_path, monkeypatch, workers):
    options = {"train_dataloader.num_workers": workers}
    train(make_config("karkat", "whole", options))
    # After the checkpoint of iteration 2, so that iteration 3 is done twice.
    cfg = make_config("karkat", "parts", options)
    cfg.custom_hooks.append({"type": "InterruptHook"})
    again = deepcopy(cfg)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    monkeypatch.setattr(InterruptHook, "after", 0)
    train(again, resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_always_predicting_the_most_frequent_class_gives_the_stated_miou(make_config):
    cfg = make_config("softmax")
    cfg.model.type = "MostFrequentClass"
    metrics = evaluate(cfg)
    assert metrics["miou"] == pytest.approx(metrics["miou_most_frequent_class"])
    assert 0 < metrics["miou"] < 50


def _register_most_frequent_class():
    from mmseg.registry import MODELS

    from segmentation.backbone import CheckedEncoderDecoder

    @MODELS.register_module(force=True)
    class MostFrequentClass(CheckedEncoderDecoder):
        def inference(self, inputs, batch_img_metas):
            logits = super().inference(inputs, batch_img_metas)
            return torch.zeros_like(logits).index_fill(1, torch.tensor(0), 1.0)


_register_most_frequent_class()


def test_learning_rate_and_iterations_follow_the_batch(make_config):
    small = make_config(options={"schedule.max_iters": None, "schedule.epochs": 3, "train_dataloader.batch_size": 4})
    base = small.optim_wrapper.optimizer.lr
    plan, _ = plan_training(small)
    assert plan["iterations"] == 18
    assert plan["learning_rate"] == pytest.approx(base * 4 / small.schedule.reference_batch_size)


def test_checkpoint_of_another_model_is_refused(trained, make_config):
    folder, _ = trained
    with pytest.raises(UserError, match="holds another model"):
        evaluate(make_config("softmax", options={"load_from": str(folder / "model.safetensors")}))


def test_broken_checkpoint_is_refused(trained, build_config, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "copy")
    path = copy / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.pth is damaged"):
        train(build_config("karkat", copy), resume=True)


class Payload:
    """What a hostile checkpoint would hold: unpickling it calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_objects_is_refused_before_they_run(make_config, tmp_path):
    torch.save({"state_dict": {}, "meta": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="more than tensors"):
        evaluate(make_config(options={"load_from": str(tmp_path / "bad.pth")}))
    assert not (tmp_path / "ran").exists()


def test_resuming_a_finished_run_evaluates_it_again(trained, build_config, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "moved")
    assert train(build_config("karkat", copy), resume=True)["miou"] == trained[1]["miou"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py does not exist"),
        ([str(CONFIG_FOLDER / "upernet_karat.py"), "--cfg-options", "model.bakcbone.weights=x"], "backbone"),
        ([str(CONFIG_FOLDER / "upernet_karat.py"), "--cfg-options", "data_rot=x"], "data_root"),
        ([str(CONFIG_FOLDER / "upernet_karat.py"), "--size", "nano", "--cfg-options", "crop_size=100"], "patch size 8"),
        (
            [str(CONFIG_FOLDER / "upernet_karat.py"), "--size", "nano", "--cfg-options", "data_root=nowhere"],
            "does not exist",
        ),
    ],
)
def test_bad_commands_end_with_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    import train_seg

    monkeypatch.setattr(sys, "argv", ["train_seg.py", *arguments, "--work-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        run_main(train_seg.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_ade20k_images_are_evaluated_by_path_alone(real_data, tmp_path, monkeypatch):
    import train_seg

    root = real_data / "ade20k_sample"
    if not root.is_dir():
        pytest.skip(f"no ADE20K sample at {root}")
    config = str(CONFIG_FOLDER / "upernet_karat.py")
    options = ["--size", "nano", "--eval-only", "--work-dir", str(tmp_path), "--cfg-options", f"data_root={root}"]
    train_seg.main([config, *options])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["iou_per_class"]) == 150 and metrics["validation_images"] == 3
    assert metrics["miou_most_frequent_class"] == pytest.approx(2.632, abs=1e-3)


def test_two_processes_train_together_and_write_once(ade_layout, tmp_path):
    tool = Path(__file__).resolve().parents[2] / "tools" / "train_seg.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tool)]
    command += [str(CONFIG_FOLDER / "upernet_softmax.py"), "--size", "nano", "--launcher", "pytorch"]
    command += ["--work-dir", str(tmp_path / "run"), "--cfg-options", f"data_root={ade_layout}", "schedule.max_iters=2"]
    command += ["train_dataloader.batch_size=2", "val_dataloader.dataset.indices=3", "log_interval=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if r["name"] == "loss" and r["split"] == "train"] == [1, 2]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["validation_images"] == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data_protocol"]["batch_size"] == 4
