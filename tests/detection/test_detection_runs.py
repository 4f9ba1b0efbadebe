"""Does a run train, continue bit for bit, survive bad images, and stop with a clear message when it must?"""

import errno
import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.training.folder import CHECKPOINT, WEIGHTS
from backbones.training.groups import OPERATOR_STEP
from backbones.training.log import read_metrics
from backbones.utils.errors import UserError, describe
from detection import engine
from detection.engine import evaluate_run, load_trained, predict, prepare, train


def weights(folder):
    return load_file(folder / WEIGHTS)


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory):
    """One finished run that several tests look at, and the config it ran with."""
    from tiny_detector import CONFIGS, TINY

    from detection.config import load_config

    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = [*paths, *TINY, "OUTPUT_DIR", str(folder), "SOLVER.EPOCHS", "1"]
    figures = train(load_config(CONFIGS / "vitdet_karkat.yaml", "nano", overrides))
    return folder, figures, overrides


def test_run_writes_every_figure(finished):
    folder, figures, _ = finished
    on_disk = json.loads((folder / "metrics.json").read_text())
    assert on_disk == figures
    for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50"):
        assert 0 <= figures[name] <= 100
    assert len(figures["box_ap_per_class"]) == len(figures["mask_ap50_per_class"]) == 10
    for name in ("parameters", "gflops", "images_per_s", "train_images_per_s", "peak_memory_mb"):
        assert figures[name] > 0
    assert figures["skipped_images"] == 0


def test_run_writes_its_curves_and_provenance(finished):
    folder, _, _ = finished
    rows = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in rows if r["name"] == "loss"] == [1, 2, 3, 4, 5, 6]
    assert {"box_ap", "mask_ap50"} <= {r["name"] for r in rows if r["split"] == "val"}
    values = {name: [r["value"] for r in rows if r["name"] == name] for name in {r["name"] for r in rows}}
    assert all(a <= b for a, b in zip(values["grad_norm"], values["grad_norm_max"], strict=True))
    assert len(values["blocks.1.attn/step"]) == 6 and 0 < max(values["blocks.1.attn/step"]) < 1
    assert "grad_norm/operator.phi" in values
    assert list((folder / "tensorboard").iterdir())
    provenance = json.loads((folder / "run.json").read_text())
    assert provenance["config"]["MODEL"]["VIT"]["arch"] == "karkat_nano_patch8_64"
    assert provenance["data_protocol"]["train"]["images"] == 24


def test_checkpoint_holds_tensors_and_plain_values_only(finished):
    state = torch.load(finished[0] / CHECKPOINT, weights_only=True)
    assert state["step"] == 6


def test_trained_detector_is_built_from_its_weights_alone(finished, tmp_path, sample_data):
    folder, _, _ = finished
    shutil.copy(folder / WEIGHTS, tmp_path / "moved.safetensors")
    model, _, categories = load_trained(tmp_path / "moved.safetensors", device="cpu")
    assert categories[3] == (5, "star")
    assert all(torch.equal(t, weights(folder)[name]) for name, t in model.state_dict().items())

    found = predict(folder, sorted((sample_data / "detection/val").iterdir())[:2], min_score=0.0)
    assert len(found) == 2
    for image in found:
        assert image["boxes"].shape == (len(image["scores"]), 4)
        assert image["masks"].shape == (len(image["scores"]), 128, 128)
        assert set(image["names"]) <= {name for _, name in categories}
        assert (np.diff(image["scores"]) <= 0).all()


def test_evaluation_alone_gives_the_same_figures(finished):
    from detection.config import load_config

    folder, figures, overrides = finished
    again = evaluate_run(
        load_config(None, None, ["MODEL.VIT.arch", "karkat_nano_patch8_64", *overrides[:8], *overrides[-4:]])
    )
    assert {k: again[k] for k in ("box_ap", "mask_ap50")} == {k: figures[k] for k in ("box_ap", "mask_ap50")}
    assert json.loads((folder / "metrics.json").read_text())["train_images_per_s"] == figures["train_images_per_s"]


def test_evaluation_on_other_classes_is_refused(finished, sample_data, tmp_path):
    from detection.config import load_config

    _, _, overrides = finished
    dataset = json.loads((sample_data / "detection/annotations/val.json").read_text())
    dataset["categories"][0]["name"] = "circle"
    (tmp_path / "val.json").write_text(json.dumps(dataset))
    cfg = load_config(
        None,
        "nano",
        ["MODEL.VIT.arch", "vit_nano_patch8_64", *overrides, "DATASETS.TEST_JSON", str(tmp_path / "val.json")],
    )
    with pytest.raises(UserError, match="they differ"):
        evaluate_run(cfg)


class Killed(Exception):
    """Stands for a machine that goes away in the middle of a run."""


@pytest.mark.parametrize(("family", "workers"), [("karkat", 0), ("softmax", 2)])
def test_a_resumed_run_equals_one_that_never_stopped(tiny, tmp_path, monkeypatch, family, workers):
    half = ["SOLVER.CHECKPOINT_EPOCHS", "0.5", "SOLVER.EPOCHS", "1", "MODEL.VIT.drop_path", "0.5"]
    train(tiny(*half, family=family, name="whole"))

    done = []
    step = engine.train_step

    def killed_at_the_fifth(*args):
        done.append(None)
        if len(done) == 5:
            raise Killed
        return step(*args)

    monkeypatch.setattr(engine, "train_step", killed_at_the_fifth)
    with pytest.raises(Killed):
        train(tiny(*half, family=family, name="halves"))
    assert torch.load(tmp_path / "halves" / CHECKPOINT, weights_only=True)["step"] == 3
    # Nothing of the process's own state may matter.
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    monkeypatch.setattr(engine, "train_step", step)
    train(tiny(*half, "DATALOADER.NUM_WORKERS", str(workers), family=family, name="halves"), resume=True)

    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    losses = [
        [(r["step"], r["value"]) for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["name"] == "loss"]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]


def test_resume_with_other_settings_is_refused(tiny):
    train(tiny())
    with pytest.raises(UserError, match=r"SOLVER\.REFERENCE_LR"):
        train(tiny("SOLVER.REFERENCE_LR", "0.5"), resume=True)


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(tiny, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(tiny(), resume=True)
    train(tiny())
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        train(tiny())
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_a_run_starts_from_a_classification_checkpoint(tiny, tmp_path, capsys):
    classifier = create_backbone("karat_nano_patch8_64", num_classes=5, depth=2)
    save_backbone(tmp_path / "classifier.safetensors", classifier)
    run = prepare(tiny("MODEL.VIT.weights", str(tmp_path / "classifier.safetensors"), family="karat"), resume=False)
    assert "100.0%" in capsys.readouterr().out
    trunk = run.model.backbone.net.trunk
    assert torch.equal(trunk.blocks[1].mlp.fc1.weight, classifier.blocks[1].mlp.fc1.weight)


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    save_backbone(tmp_path / "other.safetensors", create_backbone("vit_nano_patch8_64", depth=2, embed_dim=48))
    with pytest.raises(UserError, match="another model"):
        prepare(tiny("MODEL.VIT.weights", str(tmp_path / "other.safetensors")), resume=False)


def test_masks_off_trains_boxes_alone(tiny):
    figures = train(tiny("MODEL.MASK_ON", "False"))
    assert "box_ap" in figures
    assert not any(name.startswith("mask") for name in figures)


@pytest.fixture
def damaged(tiny, sample_data, tmp_path):
    """A config whose first ``count`` images of a split are cut short."""

    def make(split: str, count: int, *overrides: str):
        name = {"TRAIN": "train", "TEST": "val"}[split]
        folder = shutil.copytree(sample_data / "detection" / name, tmp_path / name)
        for path in sorted(folder.iterdir())[:count]:
            path.write_bytes(path.read_bytes()[:700])
        return tiny(f"DATASETS.{split}_IMAGES", str(folder), "SOLVER.EPOCHS", "1", *overrides)

    return make


def test_a_truncated_training_image_is_named_skipped_and_counted(damaged, capsys):
    figures = train(damaged("TRAIN", 1))
    assert figures["skipped_images"] == 1
    assert capsys.readouterr().err.count("train_00000.jpg") == 1


def test_more_truncated_images_than_one_percent_fail_the_run(damaged, tmp_path):
    with pytest.raises(UserError, match="2 of 24 training images are unreadable"):
        train(damaged("TRAIN", 2))
    assert not (tmp_path / "run/metrics.json").exists()


def test_a_truncated_image_in_a_worker_gives_the_same_message(damaged):
    with pytest.raises(UserError) as caught:
        train(damaged("TRAIN", 2, "DATALOADER.NUM_WORKERS", "1"))
    assert describe(caught.value).startswith("2 of 24 training images")


def test_a_truncated_evaluation_image_is_named(damaged):
    with pytest.raises(UserError, match=r"cannot read image .*val_00000\.jpg"):
        train(damaged("TEST", 1))


def test_an_image_of_another_size_than_its_json_says_is_named(tiny, sample_data, tmp_path):
    from PIL import Image

    folder = shutil.copytree(sample_data / "detection/train", tmp_path / "train")
    Image.new("RGB", (50, 40)).save(folder / "train_00003.jpg")
    with pytest.raises(UserError, match=r"train_00003\.jpg.*50, 40"):
        train(tiny("DATASETS.TRAIN_IMAGES", str(folder), "SOLVER.EPOCHS", "1"))


def test_no_disk_space_leaves_no_half_written_file(tiny, tmp_path, monkeypatch):
    def full_disk(_state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("backbones.training.state.torch.save", full_disk)
    with pytest.raises(OSError, match="No space") as caught:
        train(tiny())
    assert "no disk space left" in describe(caught.value)
    assert [p.name for p in (tmp_path / "run").rglob("*") if "checkpoint" in p.name] == []


def test_a_non_finite_loss_names_the_module(tiny, monkeypatch):
    real = engine.prepare

    def poisoned(cfg, resume):
        run = real(cfg, resume)
        with torch.no_grad():
            run.model.backbone.net.trunk.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
        return run

    monkeypatch.setattr(engine, "prepare", poisoned)
    with pytest.raises(
        UserError, match=r"diverged at step 0.*backbone\.net\.trunk\.blocks\.1\.mlp\.fc1 .*REFERENCE_LR"
    ):
        train(tiny())


def test_learning_rate_follows_batch_and_depth(tiny):
    small = prepare(tiny("SOLVER.REFERENCE_LR", "0.01", "SOLVER.REFERENCE_BATCH", "8"), resume=False)
    assert small.schedule.base_lr == pytest.approx(0.005)
    optimizer, model = small.optimizer, small.model
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    decay = small.cfg.SOLVER.LAYER_DECAY
    first = group_of[id(named["backbone.net.trunk.blocks.0.mlp.fc1.weight"])]
    head = group_of[id(named["roi_heads.box_predictor.cls_score.weight"])]
    assert (first["lr_scale"], head["lr_scale"]) == (pytest.approx(decay**2), 1.0)
    assert head["weight_decay"] == small.cfg.SOLVER.WEIGHT_DECAY > 0
    for name in (
        "backbone.net.trunk.pos_embed",
        "backbone.net.trunk.blocks.0.norm1.weight",
        "backbone.simfp_3.0.norm.weight",
    ):
        assert group_of[id(named[name])]["weight_decay"] == 0.0, name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)


def test_operators_learn_at_the_rates_that_follow_from_their_sizes(tiny):
    derived, literal = (
        prepare(tiny("SOLVER.OPERATOR_LR", value, "SOLVER.LAYER_DECAY", "1.0", family="karat"), resume=False)
        for value in ("derived", "1.0")
    )
    for run, expected in (
        (derived, OPERATOR_STEP / (12 * 64)),
        (literal, 1.0),
    ):  # W of r × N numbers in the global block
        named = dict(run.model.named_parameters())
        group_of = {id(p): g for g in run.optimizer.param_groups for p in g["params"]}
        w = group_of[id(named["backbone.net.trunk.blocks.1.attn.operator.w"])]
        assert w["lr_scale"] == pytest.approx(expected)


def test_rational_coefficients_take_no_decay(tiny):
    small = prepare(tiny(family="kat"), resume=False)
    decay_of = {id(p): g["weight_decay"] for g in small.optimizer.param_groups for p in g["params"]}
    coefficients = {n: p for n, p in small.model.named_parameters() if "weight_numerator" in n or "weight_denom" in n}
    assert len(coefficients) == 8  # two activations in each of two blocks
    assert {decay_of[id(p)] for p in coefficients.values()} == {0.0}


def test_detector_finetunes_from_another_runs_weights(finished, tiny, capsys):
    folder, _, _ = finished
    run = prepare(tiny("MODEL.WEIGHTS", str(folder / WEIGHTS), family="karkat"), resume=False)
    assert all(torch.equal(t, weights(folder)[name]) for name, t in run.model.state_dict().items())
    with pytest.raises(UserError, match="fills"):
        prepare(tiny("MODEL.WEIGHTS", str(folder / WEIGHTS), "MODEL.VIT.embed_dim", "48"), resume=False)
