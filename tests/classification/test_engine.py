"""Classification end to end: training, exact resume, evaluation, data formats, and bad input through the command."""

import errno
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from backbones import create_backbone
from backbones.checkpoint import read_weights
from backbones.training.folder import CHECKPOINT
from backbones.training.log import read_metrics
from backbones.training.processes import Processes
from classification import engine, run
from classification.config import load_recipe
from classification.run import Run, make_schedule

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "classification" / "recipes" / "nano.yaml"
SMALL = ["model.depth=2", "model.embed_dim=48", "train.epochs=2", "train.batch_size=16", "train.log_every=1"]


def recipe(data, output, *overrides):
    words = [f"data.root={data}", f"output={output}", "data.workers=0", "model.drop_path=0.2", *SMALL, *overrides]
    return load_recipe(NANO, words)


@pytest.fixture
def images(sample_data):
    return sample_data / "classification"


@pytest.fixture
def own_images(images, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def command(*words):
    line = [sys.executable, str(ROOT / "tools" / "pretrain_cls.py"), "--config", str(NANO), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("arch", ["vit", "karkat"])
def test_a_run_leaves_all_it_takes_to_repeat_and_judge_it(images, tmp_path, arch):
    metrics = engine.train(recipe(images, tmp_path / "run", f"model.arch={arch}_nano_patch8_64", "train.ema_decay=0.9"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert {"top1", "top5", "parameters", "gflops", "images_per_s", "peak_memory_mb", "skipped_images"} <= set(metrics)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["derived"]["lr"] == pytest.approx(1.5e-3 * 16 / 64)
    assert run["data_protocol"]["train_images"] == 96
    names = {(row["split"], row["name"]) for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert {("train", "loss"), ("val", "top1"), ("train", "grad_norm_max")} <= names
    assert (("train", "blocks.0.attn/step") in names) == (arch == "karkat")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    counts = {p.name: len(list(p.iterdir())) for p in (images / "val").iterdir()}
    by_class = metrics["top1_per_class"]
    assert sum(by_class[name] * count for name, count in counts.items()) / 48 == pytest.approx(metrics["top1"])
    again = engine.evaluate_only(recipe(images, tmp_path / "run"))
    assert again["top1_per_class"] == by_class
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_rational_coefficients_take_no_decay(tmp_path, layer_decay):
    settings = recipe(tmp_path, tmp_path / "run", "model.arch=kat_nano_patch8_64", f"train.layer_decay={layer_decay}")
    network = create_backbone("kat_nano_patch8_64", depth=2)
    optimizer, _ = make_schedule(settings, network, steps=10, batch=16)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(network.named_parameters())
    coefficients = [n for n in named if n.endswith(("weight_numerator", "weight_denominator"))]
    assert len(coefficients) == 8  # two activations in each of two blocks
    assert {decay_of[id(named[name])] for name in coefficients} == {0.0}
    assert decay_of[id(named["blocks.0.mlp.fc1.weight"])] == settings.train.weight_decay > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [0, 4])  # steps; an epoch has 6
def test_resume_continues_bit_for_bit(images, tmp_path, monkeypatch, workers, every):
    extra = ["train.ema_decay=0.9", "augment.mixup=0.5", f"data.workers={workers}", f"train.save_steps={every}"]
    whole = engine.train(recipe(images, tmp_path / "whole", *extra))
    save = Run.save

    def interrupted(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", interrupted)
        engine.train(recipe(images, tmp_path / "parts", *extra))
    torch.rand(7)
    resumed = engine.train(recipe(images, tmp_path / "parts", *extra), resume=True)
    assert resumed["loss"] == whole["loss"]
    states = [read_weights(tmp_path / run / "model.safetensors")[0] for run in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_workers_do_not_change_the_batches(images, tmp_path):
    losses = [
        engine.train(recipe(images, tmp_path / str(n), f"data.workers={n}", "train.epochs=1", "train.warmup_epochs=0"))
        for n in (0, 2)
    ]
    assert losses[0]["loss"] == losses[1]["loss"]


def test_it_learns(images, tmp_path):
    words = ["train.epochs=8", "train.lr=6e-3", "model.drop_path=0", "augment.color_jitter=0", "train.eval_every=8"]
    engine.train(recipe(images, tmp_path / "run", *words))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["value"] for row in rows if row["name"] == "loss" and row["split"] == "train"]
    assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.2


def test_a_truncated_training_image_is_named_skipped_and_counted(own_images, tmp_path, capsys):
    bad = sorted((own_images / "train" / "cross").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:700])
    metrics = engine.train(recipe(own_images, tmp_path / "run", "train.epochs=1", "train.warmup_epochs=0"))
    assert metrics["skipped_images"] == 1
    assert str(bad) in capsys.readouterr().err
    for other in sorted((own_images / "train" / "cross").iterdir())[:3]:
        other.write_bytes(b"no image")
    with pytest.raises(ValueError, match="of 96 training images are unreadable, more than 1%"):
        engine.train(recipe(own_images, tmp_path / "second"))


def test_a_truncated_validation_image_ends_the_run_by_name(own_images, tmp_path):
    bad = sorted((own_images / "val" / "star").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:700])
    result = command(f"data.root={own_images}", f"output={tmp_path / 'run'}", "data.workers=1", *SMALL)
    assert result.returncode == 2
    assert f"cannot read the image {bad}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob("*.part"))


def test_tar_files_give_the_folders_images(images, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(images / split, arcname=split)
    from_folder = engine.train(recipe(images, tmp_path / "a", "train.epochs=1", "train.warmup_epochs=0"))
    from_tar = engine.train(recipe(tmp_path, tmp_path / "b", "train.epochs=1", "train.warmup_epochs=0"))
    assert from_tar["top5"] == pytest.approx(from_folder["top5"], abs=25)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["data_protocol"]["train_images"] == 96


def test_no_disk_space_leaves_no_half_file(images, tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        engine.train(recipe(images, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.part"))
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_a_non_finite_loss_names_the_first_module(images, tmp_path, monkeypatch):
    build = run.create_backbone

    def poisoned(config):
        network = build(config)
        with torch.no_grad():
            network.blocks[1].mlp.fc1.weight.fill_(float("nan"))
        return network

    monkeypatch.setattr(run, "create_backbone", poisoned)
    with pytest.raises(ValueError, match=r"step 0.*first non-finite output is that of blocks\.1\.mlp\.fc1"):
        engine.train(recipe(images, tmp_path / "run"))


def test_two_processes_share_the_data_and_agree(images, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"]
    line += [str(ROOT / "tools" / "pretrain_cls.py"), "--config", str(NANO), f"data.root={images}", *SMALL]
    line += [
        f"output={tmp_path}/run",
        "data.workers=0",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.ema_decay=0.9",
    ]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["derived"]["batch"] == 32
    alone = engine.evaluate_only(recipe(images, tmp_path / "run"))
    assert alone["top1"] == metrics["top1"]
    assert alone["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=/no/such/folder"], "data.root /no/such/folder is not a folder"),
        (["data.root={empty}"], "has no folder or .tar named 'train'"),
        (["data.root={images}", "model.arch=karat_nono"], "unknown backbone 'karat_nono'"),
        (["data.root={images}", "model.img_size=60"], "60x60 is not divisible by the patch size 8; use 56 or 64"),
        (["data.root={images}", "model.grids=3"], "no key 'grids'"),
        (["data.root={images}", "train.batch_size=4096"], "fewer than one batch of 4096"),
        (["data.root={images}", "--resume"], "nothing to resume"),
        (["data.root={images}", "--eval-only"], "no weights to evaluate"),
        (["data.root={images}", "model.weights={other}"], "checkpoint of another model"),
        (["data.root={images}", "output={images}/train/star/0.txt"], "a file is in the way"),
    ],
)
def test_bad_input_ends_with_one_message(own_images, tmp_path, words, message, monkeypatch, capsys):
    from pretrain_cls import main

    from backbones import create_backbone
    from backbones.checkpoint import save_backbone
    from backbones.utils.errors import run_main

    (tmp_path / "empty").mkdir()
    (own_images / "train" / "star" / "0.txt").write_text("")
    save_backbone(tmp_path / "other.safetensors", create_backbone("vit_nano_patch8_64", embed_dim=72))
    names = {"images": own_images, "empty": tmp_path / "empty", "other": tmp_path / "other.safetensors"}
    words = [word.format(**names) for word in [f"output={tmp_path / 'run'}", *words]]
    monkeypatch.setattr(sys, "argv", ["pretrain_cls.py", "--config", str(NANO), *SMALL, *words])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_same_folder_is_not_trained_into_twice(images, tmp_path):
    engine.train(recipe(images, tmp_path / "run", "train.epochs=1", "train.warmup_epochs=0"))
    with pytest.raises(ValueError, match="holds a run already"):
        engine.train(recipe(images, tmp_path / "run"))


def test_a_class_missing_from_training_is_named(own_images, tmp_path):
    (own_images / "val" / "zebra").mkdir()
    Image.new("RGB", (64, 64)).save(own_images / "val" / "zebra" / "0.png")
    with pytest.raises(ValueError, match="class 'zebra', which the training images lack"):
        engine.train(recipe(own_images, tmp_path / "run"))


def test_cifar10_folders_train(real_data, tmp_path):
    """Class folders under train and test, as CIFAR-10 is often unpacked: 12 and 4 images of each class."""
    counts: dict[str, int] = {}
    with tarfile.open(real_data / "cifar10" / "test.tar.gz") as tar:
        for member in tar:
            name = member.name.split("/")[0]
            if not member.isfile() or counts.get(name, 0) == 16:
                continue
            counts[name] = counts.get(name, 0) + 1
            tar.extract(member, tmp_path / "cifar" / ("train" if counts[name] <= 12 else "test"), filter="data")
    metrics = engine.train(recipe(tmp_path / "cifar", tmp_path / "run", "model.img_size=32", "model.patch_size=4"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["data_protocol"]["train_images"], run["data_protocol"]["val_images"]) == (120, 40)
    assert 0 <= metrics["top1"] <= 100


def test_top1_by_class_is_of_that_class_s_images():
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.eye(4)[torch.full((len(images),), 2)]

    world = Processes("cpu")
    batches = [(torch.zeros(3, 3, 8, 8), torch.tensor([0, 2, 2])), (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))]
    metrics = engine.evaluate(Constant(), batches, None, world, ["a", "b", "c", "d"])
    assert metrics["top1_per_class"] == {"a": 0.0, "b": 0.0, "c": 100.0, "d": None}  # d has no image
    assert metrics["top1"] == pytest.approx(60.0)
