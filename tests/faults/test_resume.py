"""A continuation is compared with what it continues: settings, classes, data and processes."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tasks import TASKS, Task, same_results

from backbones.training import state
from backbones.training.log import read_metrics
from backbones.utils.errors import UserError

REFUSED = {
    "classification": {
        "train.lr": 0.1,
        "train.batch_size": 8,
        "train.seed": 5,
        "train.weight_decay": 0.3,
        "train.ema_decay": 0.0,
        "train.warmup_epochs": 1,
        "train.operator_lr": 1.0,
        "model.drop_path": 0.5,
        "model.depth": 3,
        "model.arch": "vit_nano_patch8_64",
        "augment.mixup": 0.0,
        "augment.smoothing": 0.0,
        "data.interpolation": "bilinear",
    },
    "detection": {
        "SOLVER.REFERENCE_LR": 0.5,
        "SOLVER.IMS_PER_BATCH": 2,
        "SEED": 5,
        "SOLVER.WEIGHT_DECAY": 0.3,
        "SOLVER.LAYER_DECAY": 0.9,
        "SOLVER.WARMUP_EPOCHS": 0.3,
        "SOLVER.OPERATOR_LR": 1.0,
        "SOLVER.CLIP_NORM": 0.0,
        "MODEL.VIT.drop_path": 0.5,
        "MODEL.VIT.depth": 3,
        "MODEL.MASK_ON": False,
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "INPUT.RANDOM_FLIP": "none",
    },
    "segmentation": {
        "optim_wrapper.optimizer.lr": 0.1,
        "train_dataloader.batch_size": 4,
        "randomness.seed": 5,
        "optim_wrapper.optimizer.weight_decay": 0.3,
        "optim_wrapper.paramwise_cfg.layer_decay": 0.9,
        "schedule.warmup_epochs": 0.1,
        "optim_wrapper.paramwise_cfg.operator_lr": 1.0,
        "optim_wrapper.clip_grad": {"max_norm": 2.0},
        "model.backbone.drop_path": 0.5,
        "model.backbone.depth": 8,
        "crop_size": 32,
        "class_balance": 1.0,
        "model.data_preprocessor.mean": [0.0, 0.0, 0.0],
    },
}
ALLOWED = {
    "classification": {"train.log_every": 3, "train.save_steps": 5, "train.eval_every": 2, "train.keep_every": 1},
    "detection": {
        "SOLVER.LOG_STEPS": 3,
        "SOLVER.CHECKPOINT_STEPS": 4,
        "TEST.EVAL_EPOCHS": 0.0,
        "SOLVER.KEEP_EPOCHS": 1,
    },
    "segmentation": {"log_interval": 3, "schedule.val_epochs": 1, "default_hooks.checkpoint.minutes": 1.0},
}
LONGER = {"classification": "train.epochs", "detection": "SOLVER.EPOCHS", "segmentation": "schedule.max_iters"}
TWICE = {"classification": 4, "detection": 2.0, "segmentation": 12}
HALF = {"classification": 1, "detection": 0.5, "segmentation": 3}


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(whole, tmp_path / "run")


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("place", range(13))
def test_another_setting_is_refused_by_name(task, copied, place):
    name, value = list(REFUSED[task.name].items())[place]
    before = weights(copied)
    with pytest.raises(UserError) as error:
        task.train(copied, {name: value}, resume=True)
    assert name in str(error.value) and "was written with" in str(error.value)
    assert weights(copied) == before


@pytest.mark.parametrize("place", range(3))
def test_an_allowed_difference_is_listed_and_applied(task, copied, place, capsys):
    name, value = list(ALLOWED[task.name].items())[place]
    task.train(copied, {name: value}, resume=True)
    assert f"changed: {name} " in capsys.readouterr().out


def test_a_longer_schedule_goes_on_and_learns(task, copied, capsys):
    before = weights(copied)
    task.train(copied, {LONGER[task.name]: TWICE[task.name]}, resume=True)
    assert f"changed: {LONGER[task.name]} " in capsys.readouterr().out
    assert weights(copied) != before
    rows = [row for row in read_metrics(copied / "metrics.jsonl") if row["name"] == "lr"]
    last = max(row["step"] for row in rows)
    assert last == {"classification": 24, "detection": 12, "segmentation": 12}[task.name]
    middle = [row["value"] for row in rows if last // 2 < row["step"] < last]
    assert len(middle) > 1 and min(middle) > 0


def test_a_schedule_that_is_over_already_is_refused(task, copied):
    with pytest.raises(UserError, match="past this run's last"):
        task.train(copied, {LONGER[task.name]: HALF[task.name]}, resume=True)


def test_a_moved_folder_continues(task, whole, tmp_path):
    moved = shutil.copytree(whole, tmp_path / "elsewhere")
    task.train(moved, resume=True)
    same_results(moved, whole)


def test_moved_data_are_the_same_data(task, whole, copied, tmp_path):
    task.data_copy(tmp_path / "data").train(copied, resume=True)
    same_results(copied, whole)


def _without_an_image(task, data):
    if task.name == "detection":
        path = data / "detection/annotations/train.json"
        content = json.loads(path.read_text())
        gone = content["images"].pop()["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
        path.write_text(json.dumps(content))
        return
    folder = data / task.name / ("train/star" if task.name == "classification" else "images/training")
    gone = sorted(folder.iterdir())[-1]
    gone.unlink()
    if task.name == "segmentation":
        (data / "segmentation/annotations/training" / gone.with_suffix(".png").name).unlink()


def _with_another_class(task, data):
    if task.name == "detection":
        for split in ("train", "val"):
            path = data / f"detection/annotations/{split}.json"
            content = json.loads(path.read_text())
            content["categories"][0]["name"] = "novelty"
            path.write_text(json.dumps(content))
    elif task.name == "segmentation":
        path = data / "segmentation/classes.json"
        names = json.loads(path.read_text())
        path.write_text(json.dumps([*names[:-1], "novelty"]))
    else:
        for split in ("train", "val"):
            (data / f"classification/{split}/star").rename(data / f"classification/{split}/novelty")


def _with_another_image(task, data):
    if task.name == "detection":
        path = data / "detection/annotations/train.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"][0] += 1
        path.write_text(json.dumps(content))
        return
    folder = data / task.name / ("train/star" if task.name == "classification" else "images/training")
    old = sorted(folder.iterdir())[-1]
    old.rename(old.with_stem("zzz"))
    if task.name == "segmentation":
        mask = data / "segmentation/annotations/training" / old.with_suffix(".png").name
        mask.rename(mask.with_stem("zzz"))


@pytest.mark.parametrize("change", [_without_an_image, _with_another_class, _with_another_image])
def test_other_data_are_refused(task, copied, tmp_path, change):
    other = task.data_copy(tmp_path / "data")
    change(other, tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.(images|classes|digest)"):
        other.train(copied, resume=True)


def test_another_number_of_processes_is_refused(task, copied, monkeypatch):
    saved = torch.load(copied / "checkpoint.pth", weights_only=True)
    state.save_checkpoint(copied / "checkpoint.pth", {**saved, "world": 2})
    with pytest.raises(UserError, match=r"the number of processes 2 \(now 1\)"):
        task.train(copied, resume=True)


def test_the_checkpoint_of_another_task_is_refused(task, copied, sample_data, tmp_path):
    saved = torch.load(copied / "checkpoint.pth", weights_only=True)
    other = next(name for name in TASKS if name != task.name)
    state.save_checkpoint(copied / "checkpoint.pth", {**saved, "task": other})
    with pytest.raises(UserError, match=f"a checkpoint of '{other}'"):
        Task(task.name, sample_data).train(copied, resume=True)


def test_every_kth_checkpoint_is_kept(task, tmp_path):
    keep = {"classification": ("train.keep_every", 1), "detection": ("SOLVER.KEEP_EPOCHS", 0.5)}
    name, value = keep.get(task.name, ("default_hooks.checkpoint.keep", 3))
    task.train(tmp_path / "run", {name: value})
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*.pth"))
    steps = {"classification": (6, 12), "detection": (3, 6), "segmentation": (3, 6)}[task.name]
    assert kept == [f"checkpoint-{step:08d}.pth" for step in steps]
    assert state.read_checkpoint(tmp_path / "run" / kept[0])["task"] == task.name


def test_a_line_of_the_log_that_was_cut_short_is_made_again(task, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    task.train(folder, resume=True)
    same_results(folder, whole)


def test_an_image_is_no_checkpoint(task, copied):
    Image.new("RGB", (9, 9)).save(copied / "checkpoint.pth", "PNG")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        task.train(copied, resume=True)
