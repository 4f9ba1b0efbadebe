"""Recipes and configs of strangers: bounded before anything is made of them, in one message, in all three tasks."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import refused

from backbones.config import BackboneConfig
from backbones.models.presets import preset_config
from backbones.utils.documents import MAX_BYTES, MAX_YAML_BYTES, parse_json, parse_yaml, read_json, read_yaml
from backbones.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "classification/recipes/nano.yaml"
KARKAT = ROOT / "detection/vitdet_karkat.yaml"


def bomb(levels=9):
    lists = [f"&a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return f"[&a0 [1,1,1,1,1,1,1,1,1],{','.join(lists)}]"


MERGES = "\n".join(["b0: &b0 {x: 1}", *(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}" for i in range(1, 9))])
YAML = {
    "bomb": (f"data:\n  mean: {bomb()}", "aliases stand for more than"),
    "bomb_in_model": (f"model:\n  arch: {bomb()}", "aliases"),
    "merge_bomb": (MERGES, "aliases"),
    "deep_flow": ("model: " + "[" * 10**5, "levels deep"),
    "deep_closed": ("model: " + "[" * 100 + "]" * 100, "levels deep"),
    "deep_maps": ("{a: " * 1000 + "1" + "}" * 1000, "levels deep"),
    "deep_dashes": ("- " * 5000, "levels deep"),
    "questions": ("? " * 5000, "levels deep"),
    "own_anchor": ("data: &a [*a]", "contains itself"),
    "own_anchor_in_map": ("data: &a {root: *a}", "contains itself"),
    "same_key": ("data: {root: a}\ndata: {root: b}", "'data' is given twice"),
    "same_inner_key": ("data: {root: a, root: b}", "'root' is given twice"),
    "python": ("output: !!python/object/apply:os.system ['touch MARK']", "could not determine a constructor"),
    "python_name": ("output: !!python/name:os.system", "could not determine a constructor"),
    "python_module": ("output: !!python/module:os", "could not determine a constructor"),
    "python_new": ("output: !!python/object/new:subprocess.Popen [touch MARK]", "could not determine a constructor"),
    "unknown_tag": ("output: !ENV x", "could not determine a constructor"),
    "nan": ("train: {lr: .nan}", "must be finite"),
    "infinity": ("train: {lr: -.inf}", "must be finite"),
    "infinite_text": ("train: {lr: 1e999}", "'1e999'; it must be a float"),
    "nan_text": ("train: {lr: nan}", "'nan'; it must be a float"),
    "nan_in_list": ("data: {mean: [nan, 0, 0]}", "list of numbers"),
    "date": ("train: {epochs: 2024-99-99}", "not valid YAML"),
    "good_date": ("train: {epochs: 2024-01-01}", "must be a int"),
    "long_number": ("train: {epochs: " + "9" * 5000 + "}", "not valid YAML"),
    "long_hex": ("train: {epochs: 0x" + "f" * 10**5 + "}", "at most 63 bits"),
    "sixties": ("train: {epochs: " + ":".join(["59"] * 10**4) + "}", "at most 63 bits"),
    "no_int": ("train: {epochs: !!int ''}", "not valid YAML"),
    "no_bool": ("train: {epochs: !!bool maybe}", "not valid YAML"),
    "no_time": ("train: {epochs: !!timestamp x}", "not valid YAML"),
    "binary": ("train: {epochs: !!binary aGVsbG8=}", "must be a int"),
    "set": ("train: !!set {epochs}", "it holds keys"),
    "open_brace": ("train: {epochs: 1", "not valid YAML"),
    "no_anchor": ("train: *nowhere", "undefined alias"),
    "two_documents": ("data: {}\n---\ndata: {}", "not valid YAML"),
    "nul": ("data: {root: 'a\0b'}", "not valid YAML"),
    "nul_escape": ('data: {root: "a\\0b"}', "must be a str"),
    "surrogate": ('data: {root: "\\ud800"}', "half of a character"),
    "list": ("[1, 2]", "must hold keys"),
    "text": ("just text", "must hold keys"),
    "number": ("5", "must hold keys"),
    "list_key": ("? [a, b]\n: 1", "not valid YAML"),
    "number_key": ("5: 1", "has no key 5"),
    "long_key": (f"{'k' * 10**5}: 1", "not valid YAML"),
    "control_key": ('"\\e[31mx": 1', "has no key"),
    "list_for_section": ("train: [1]", "it holds keys"),
    "too_long": ("#" * (MAX_YAML_BYTES + 1), "bytes"),
    "huge_batch": ("train: {batch_size: 10000000000}", "must be between"),
    "huge_epochs": ("train: {epochs: 999999999999}", "must be between"),
    "huge_workers": ("data: {workers: 100000}", "must be between"),
    "negative_seed": ("train: {seed: -1}", "must be between"),
    "huge_seed": ("train: {seed: 9223372036854775808}", "at most 63 bits"),
    "huge_float": ("train: {lr: 1.0e+300}", "must be between"),
    "long_list": (f"data: {{mean: [{'0,' * 1000}0]}}", "1001 values"),
    "short_list": ("train: {betas: [0.9]}", "1 values"),
    "zero_std": ("data: {std: [0, 1, 1]}", "must be between"),
    "beta_of_one": ("train: {betas: [0.9, 1]}", "must be between"),
    "many_pixels": ("data: {max_pixels: 99999999999999}", "must be between"),
}


@pytest.mark.parametrize("kind", YAML)
def test_recipe(kind, tmp_path, monkeypatch):
    from classification.config import load_recipe

    monkeypatch.chdir(tmp_path)
    text, message = YAML[kind]
    Path("x.yaml").write_text(text, encoding="utf-8")
    with refused(message):
        load_recipe("x.yaml", ["data.root=x", "model.arch=vit_tiny_patch16_224"])
    assert not Path("MARK").exists()


OVERRIDES = [
    f"data.mean={bomb()}",
    "data.mean=" + "[" * 5000,
    "train.lr=.inf",
    "train.lr=nan",
    "train.epochs=!!python/object/apply:os.system ['touch MARK']",
    f"train.epochs={'9' * 5000}",
    ".".join(["model"] * 500) + "=1",
    "model.arch=[1]",
    "=1",
    "train.epochs",
    "\x1b[31m=1",
]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: repr(text[:24]))
def test_override(override, tmp_path, monkeypatch):
    from classification.config import load_recipe

    monkeypatch.chdir(tmp_path)
    with refused():
        recipe = load_recipe(NANO, ["data.root=x", override])
        preset_config(recipe.model.pop("arch")).merged(recipe.model)
    assert not Path("MARK").exists()


JSON = {
    "deep": ("[" * 10**5, "levels deep"),
    "deep_closed": ("[" * 200 + "]" * 200, "levels deep"),
    "nan": ("NaN", "NaN is not a number"),
    "infinity": ('{"a": -Infinity}', "is not a number"),
    "infinite": ("1e999", "must be finite"),
    "same_key": ('{"a": 1, "a": 2}', "appears twice"),
    "long_number": ("9" * 5000, "not valid JSON"),
    "large_number": ("9" * 500, "at most 63 bits"),
    "surrogate": ('"\\ud800"', "half of a character"),
    "cut": ('{"a": [1, 2', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "two": ("{} {}", "not valid JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json(kind):
    text, message = JSON[kind]
    with refused(message):
        parse_json(text, "x")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_text_file(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes("größe: 1".encode("latin-1"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MAX_BYTES + 1)
    for name, message in (
        ("pipe", "a pipe, socket or device"),
        (".", "is a folder"),
        ("none", "does not exist"),
        ("latin", "not UTF-8"),
        ("latin/x", "does not exist"),
        ("large", "more than"),
        ("a\0b", "is no path"),
    ):
        with refused(message):
            read(tmp_path / name, "x")
    with refused("a pipe, socket or device"):
        read("/dev/zero", "x")
    with pytest.raises(OSError, match="loop"):  # told by describe
        read(tmp_path / "loop", "x")


def test_memory_of_a_bomb_is_bounded(tmp_path):
    (tmp_path / "x.yaml").write_text(f"data:\n  mean: {bomb(10)}\n")
    code = f"""
import resource
from backbones.utils.documents import read_yaml
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
read_yaml({str(tmp_path / "x.yaml")!r}, "x")"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert "UserError" in done.stderr and "aliases" in done.stderr


def test_mutated_recipes_are_read_or_refused(tmp_path):
    from classification.config import load_recipe

    raw, rng, refusals = NANO.read_text().encode(), random.Random(0), 0
    for _ in range(150):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.choice(b"[]{}:&*!-#'\"\n\t 0e.\xff\x00")
        (tmp_path / "x.yaml").write_bytes(data)
        try:
            load_recipe(tmp_path / "x.yaml", ["data.root=x"])
        except UserError:
            refusals += 1
    assert refusals > 30


KARAT = preset_config("karkat_nano_patch8_64").to_dict()
BACKBONE = [
    *({name: 10**9} for name in ("depth", "embed_dim", "num_heads", "patch_size", "in_chans", "num_classes")),
    *({name: 10**9} for name in ("window_size", "gpsa_blocks", "img_size")),
    *({name: value} for name in ("depth", "embed_dim", "num_classes", "arch") for value in (True, 1.5, [1], {}, -1)),
    *({"attention": {name: 10**9}} for name in ("rank", "grid", "spline_order", "heads", "blocks")),
    *({"ffn": {name: 10**9}} for name in ("groups", "grid", "order", "degrees", "ratio")),
    *({"ffn": {"ratio": value}} for value in (float("nan"), float("inf"), 1e300, 1e-9, True, "4")),
    *({name: float("nan")} for name in ("drop_path", "drop_rate", "weights_min_match")),
    *({name: [1] * 10**5} for name in ("out_indices", "global_blocks", "stage_depths", "img_size")),
    {"stage_depths": [10**8] * 4},
    {"stage_depths": [1] * 200},
    {"out_indices": [10**30]},
    {"out_indices": range(10**12)},
    {"img_size": [2**16, 2**16], "patch_size": 1},
    {"attention": {"rank": [4] * 10**6}},
    {"attention": {"kind": ["karat"]}},
    {"attention": {"kind": "karat" * 10**6}},
    {"attention": "karat"},
    {"ffn": {"degrees": [10**9, 4]}},
    {"weights": ["a"]},
    {"weights": "a\0b"},
    {"\x1b[31m": 1},
    {5: 1},
    {"attention": {5: 1}},
]


@pytest.mark.parametrize("changes", BACKBONE, ids=lambda changes: repr(changes)[:40])
def test_backbone(changes):
    with refused():
        nested = {
            k: {**KARAT[k], **v} if isinstance(v, dict) and isinstance(KARAT.get(k), dict) else v
            for k, v in changes.items()
        }
        BackboneConfig.from_dict({**KARAT, **nested})
    with refused():
        preset_config("karkat_nano_patch8_64").merged(changes)


@pytest.mark.parametrize("values", [None, [], "vit", 5], ids=repr)
def test_backbone_that_is_no_mapping(values):
    with refused("it must hold keys"):
        BackboneConfig.from_dict(values)


DETECTION = {
    "bomb": (f"INPUT: {{FORMAT: {bomb()}}}", "aliases"),
    "deep": ("MODEL: " + "{a: " * 500, "levels deep"),
    "own_base": ("_BASE_: x.yaml", "builds on itself"),
    "missing_base": ("_BASE_: none.yaml", "builds on"),
    "list_base": ("_BASE_: [x.yaml]", "must be the path of one file"),
    "base_folder": ("_BASE_: .", "is a folder"),
    "base_device": ("_BASE_: /dev/zero", "a pipe, socket or device"),
    "python": ("OUTPUT_DIR: !!python/object/apply:os.system ['touch MARK']", "could not determine a constructor"),
    "same_key": ("SEED: 1\nSEED: 2", "given twice"),
    "nan": ("SOLVER: {EPOCHS: .nan}", "must be finite"),
    "text_nan": ("SOLVER: {EPOCHS: nan}", "must be a float"),
    "infinite": ("SOLVER: {EPOCHS: 1e999}", "must be a float"),
    "epochs": ("SOLVER: {EPOCHS: 1.0e+15}", "at most"),
    "workers": ("DATALOADER: {NUM_WORKERS: 100000}", "whole number from 0"),
    "negative_workers": ("DATALOADER: {NUM_WORKERS: -1}", "whole number from 0"),
    "image_size": ("INPUT: {IMAGE_SIZE: 100000000}", "whole number from 1"),
    "text_size": ("INPUT: {MIN_SIZE_TEST: big}", "whole number from 1"),
    "pixels": ("INPUT: {MAX_PIXELS: 0}", "whole number from 1"),
    "layers": ("MODEL: {ROI_BOX_HEAD: {NUM_FC: 1000000000}}", "whole number from 0 to 64"),
    "width": ("MODEL: {ROI_BOX_HEAD: {FC_DIM: 1000000000}}", "at most 16384"),
    "depth": ("MODEL: {VIT: {depth: 1000000000}}", "may be at most"),
    "class": ("MODEL: {META_ARCHITECTURE: os.system}", "'GeneralizedRCNN'"),
    "backbone": ("MODEL: {BACKBONE: {NAME: subprocess.Popen}}", "allowed"),
    "heads": ("MODEL: {ROI_HEADS: {NAME: [1]}}", "it must be a str"),
    "mean": ("MODEL: {PIXEL_MEAN: [1.0, 2.0]}", "three numbers"),
    "std": ("MODEL: {PIXEL_STD: [0.0, 1.0, 1.0]}", "of STD above 0"),
    "features": ("MODEL: {RPN: {IN_FEATURES: 5}}", "must be a list"),
    "anchors": ("MODEL: {ANCHOR_GENERATOR: {SIZES: x}}", "must be a list"),
    "section": ("MODEL: 5", "it is a section"),
    "list": ("[1]", "holds no keys"),
    "seed": ("SEED: -5", "whole number from 0"),
    "nul": ('OUTPUT_DIR: "a\\0b"', "NUL"),
}


@pytest.mark.parametrize("kind", DETECTION)
def test_detection_config(kind, tmp_path, monkeypatch):
    from detection.config import load_config

    monkeypatch.chdir(tmp_path)
    text, message = DETECTION[kind]
    if "_BASE_" not in text and not text.startswith("["):
        text = f"_BASE_: {KARKAT}\n{text}"
    Path("x.yaml").write_text(text)
    with refused(message):
        load_config("x.yaml")
    assert not Path("MARK").exists()


def test_chain_of_bases_ends(tmp_path):
    from detection.config import load_config

    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: {number + 1}.yaml")
    with refused("more than 16 others"):
        load_config(tmp_path / "0.yaml")
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml")
    with refused("builds on itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "pair",
    [
        ("SOLVER.EPOCHS", "1e999"),
        ("SEED", "9" * 5000),
        ("MODEL.VIT.depth", "10**9"),
        (".".join("A" * 500), "1"),
        ("A", "[" * 9999),
    ],
    ids=lambda pair: pair[0][:20],
)
def test_detection_override(pair):
    from detection.config import load_config

    with refused():
        load_config(KARKAT, "nano", pair)


SEGMENTATION = {
    "crop": ("crop_size", 10**9, "crop_size is 1000000000"),
    "no_crop": ("crop_size", 0, "whole number from 1"),
    "text_crop": ("crop_size", "big", "whole number from 1"),
    "nan_crop": ("crop_size", float("nan"), "finite"),
    "pixels": ("max_pixels", -1, "whole number from 1"),
    "epochs": ("schedule.epochs", 1e300, "a number from"),
    "nan_epochs": ("schedule.epochs", float("nan"), "finite"),
    "no_interval": ("schedule.val_epochs", 0, "a number from"),
    "iterations": ("schedule.max_iters", 10**12, "max_iters"),
    "batch": ("train_dataloader.batch_size", 10**9, "batch_size"),
    "workers": ("train_dataloader.num_workers", 10**5, "num_workers"),
    "seed": ("randomness.seed", -1, "seed"),
    "rate": ("optim_wrapper.optimizer.lr", float("inf"), "finite"),
    "balance": ("class_balance", 10**6, "class_balance"),
    "root": ("data_root", 5, "must be the path"),
    "nul_root": ("data_root", "a\0b", "must be the path"),
    "depth": ("model.backbone.depth", 10**9, "may be at most"),
    "ratio": ("model.backbone.ffn", {"ratio": float("inf")}, "finite"),
    "mean": ("model.data_preprocessor.mean", [float("nan")] * 3, "finite"),
    "channels": ("model.decode_head.channels", 10**15, "too large"),
    "arch": ("model.backbone.arch", ["x"], "unknown backbone"),
    "unknown": ("modle.x", 1, "has no key 'modle'"),
}


@pytest.mark.parametrize("kind", SEGMENTATION)
def test_segmentation_config(kind, sample_data, tmp_path):
    from segmentation.config import CONFIG_FOLDER, load_config

    key, value, message = SEGMENTATION[kind]
    with refused(message):
        load_config(
            CONFIG_FOLDER / "upernet_karkat.py",
            None,
            {"data_root": str(sample_data / "segmentation"), "crop_size": 64, key: value},
            tmp_path,
        )


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "pkl"])
def test_segmentation_config_that_is_no_python_file(suffix, tmp_path):
    from segmentation.config import load_config

    path = tmp_path / f"x.{suffix}"
    path.write_text(f"data_root: !!python/object/apply:os.system ['touch {tmp_path}/MARK']")
    with refused("no Python file"):
        load_config(path)
    assert not (tmp_path / "MARK").exists()


def test_parsed_values_stay_what_they_were():
    assert parse_yaml("base: &b {x: 1}\nc: {<<: *b, x: 2}\nd: [*b, *b]", "x")["d"] == [{"x": 1}, {"x": 1}]
    assert parse_json('{"a": [1, 2.5, null, "ü"]}', "x") == {"a": [1, 2.5, None, "ü"]}
