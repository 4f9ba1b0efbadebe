"""Weights of strangers: reading them runs nothing, whatever their headers and pickles say, in all three tasks."""

# ruff: noqa: E501 - the lists of values
import copy
import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from hostile import mutated, refused
from safetensors.torch import save_file

from backbones import create_backbone
from backbones.checkpoint import load_weights, read_metadata, read_weights, save_backbone
from backbones.utils.errors import UserError
from backbones.utils.files import save_weights

STATE = {"x": torch.zeros(10**5)}


class Runs:
    """What makes the file MARK when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    yield tmp_path / "MARK"
    assert not (tmp_path / "MARK").exists()


@pytest.fixture(scope="session")
def segmentor(sample_data, tmp_path_factory):
    """A description as training writes it, the classes and palette beside it, and the segmentor's file."""
    from mmseg.registry import MODELS

    from backbones.training.state import save_model
    from segmentation.config import CONFIG_FOLDER, load_config
    from segmentation.state import header

    options = {"data_root": str(sample_data / "segmentation"), "model.backbone.depth": 4}
    cfg = load_config(CONFIG_FOLDER / "upernet_karkat.py", "nano", options)
    model = MODELS.build(cfg.model)
    meta = {"classes": [f"c{i}" for i in range(cfg.model.decode_head.num_classes)]}
    meta["palette"] = [[1, 2, 3]] * len(meta["classes"])
    path = tmp_path_factory.mktemp("segmentor") / "model.safetensors"
    found = header(cfg, model, meta)
    save_model(path, model.state_dict(), found)
    return found, path


def test_what_training_writes_is_read(segmentor):
    from segmentation.engine import load_trained

    assert load_trained(segmentor[1].parent, "cpu").dataset_meta["classes"][0] == "c0"


CALL = {"type": "subprocess.check_call", "args": ["touch", "MARK"]}
PRETRAINED = {"type": "Pretrained", "checkpoint": "evil.pth"}
MODEL = ("model",)
HEAD = ("model", "decode_head")
DESCRIPTIONS = {
    **{f"call_for_{'.'.join(map(str, place))}": (place, CALL) for place in (
        MODEL, HEAD, ("model", "backbone"), ("model", "neck"), ("model", "auxiliary_head"), ("model", "data_preprocessor"),
        (*HEAD, "norm_cfg"), (*HEAD, "loss_decode"), (*HEAD, "act_cfg"), ("model", "neck", "norm_cfg"), ("model", "test_cfg"),
        ("model", "train_cfg"), ("test_pipeline", 0), ("test_pipeline", 1), ("model", "backbone", "attention"),
        ("model", "backbone", "ffn"), (*HEAD, "channels"), ("model", "data_preprocessor", "test_cfg"), ("test_pipeline", 1, "scale"))},
    **{f"type_{name}": ((*HEAD, "type"), name) for name in (
        "os.system", "builtins.exec", "mmseg.UPerHead", "mmengine::UPerHead", "mmseg.models.decode_heads.UPerHead", "PSPHead", "",
        "UPerHead\0", "uperhead", "torch.hub.load", "KarvisBackbone")},
    **{f"type_of_{type(value).__name__}": ((*HEAD, "type"), value) for value in (5, None, ["UPerHead"], {"type": "UPerHead"}, True)},
    **{f"init_cfg_in_{'.'.join(map(str, place))}": ((*place, "init_cfg"), PRETRAINED) for place in (
        MODEL, HEAD, ("model", "backbone"), ("model", "auxiliary_head"), (*HEAD, "norm_cfg"), (*HEAD, "loss_decode"))},
    "init_cfg_in_a_list": ((*HEAD, "init_cfg"), [PRETRAINED]),
    "no_init_cfg": ((*HEAD, "init_cfg"), None),
    "pretrained": ((*MODEL, "pretrained"), "evil.pth"),
    "delete": ((*HEAD, "_delete_"), True),
    "scope": ((*HEAD, "_scope_"), "mmdet"),
    "scope_of_model": ((*MODEL, "_scope_"), "mmengine"),
    "base": (("_base_",), "evil.py"),
    "hooks": (("custom_hooks",), [CALL]),
    "imports": (("custom_imports",), {"imports": ["evil"]}),
    "sampler": ((*HEAD, "sampler"), CALL),
    "conv": ((*HEAD, "conv_cfg"), CALL),
    "augments": (("model", "data_preprocessor", "batch_augments"), [CALL]),
    "backend": (("test_pipeline", 0, "backend_args"), {"backend": "petrel"}),
    "transforms": (("test_pipeline", 0), {"type": "TestTimeAug", "transforms": [CALL]}),
    "compose": (("test_pipeline", 0), {"type": "Compose", "transforms": [CALL]}),
    "heads": (("model", "auxiliary_head"), [CALL]),
    "losses": ((*HEAD, "loss_decode"), [CALL]),
    "weights": (("model", "backbone", "weights"), "/etc/passwd"),
    "arch": (("model", "backbone", "arch"), "resnet50"),
    "depth": (("model", "backbone", "depth"), 10**9),
    "width": (("model", "backbone", "embed_dim"), 16384),
    "channels": ((*HEAD, "channels"), 10**9),
    "in_channels": ((*HEAD, "in_channels"), [10**9] * 4),
    "convs": (("model", "auxiliary_head", "num_convs"), 10**9),
    "classes": ((*HEAD, "num_classes"), 10**9),
    "pools": ((*HEAD, "pool_scales"), list(range(1, 5000))),
    "nested_list": ((*HEAD, "in_index"), [[0]]),
    "no_stride": (("model", "test_cfg"), {"mode": "slide", "crop_size": [64, 64], "stride": [0, 0]}),
    "no_mode": (("model", "test_cfg"), {"mode": "os.system"}),
    "no_pipeline": (("test_pipeline",), []),
    "text_for_pipeline": (("test_pipeline",), "LoadCheckedImage"),
    "long_pipeline": (("test_pipeline",), [{"type": "LoadCheckedImage"}] * 1000),
    "text_for_model": (("model",), "CheckedEncoderDecoder"),
    "no_model": (("model",), None),
    "lambda": ((*HEAD, "lambda"), "x"),
}  # fmt: skip


def changed(values, place, value):
    values = copy.deepcopy(values)
    node = values
    for part in place[:-1]:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[place[-1]] = value
    return values


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_description_of_a_segmentor(kind, segmentor, tmp_path, mark, monkeypatch):
    from segmentation.engine import load_trained

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Runs(mark)}, "evil.pth")
    settings = changed(segmentor[0].settings, *DESCRIPTIONS[kind])
    header = {**{k: getattr(segmentor[0], k) for k in ("backbone", "classes", "transform", "extra")}, "versions": {}}
    save_weights("model.safetensors", STATE, {"task": "segmentation", "settings": settings, **header})
    with refused() as caught:
        load_trained(tmp_path)
    assert "another model" not in str(caught.value)
    # as a file from before headers were one
    old = {"task": "segmentation", "config": settings, "dataset_meta": {"classes": header["classes"]}}
    save_file(STATE, "model.safetensors", metadata={k: json.dumps(v) for k, v in old.items()})
    with refused():
        load_trained(tmp_path)


RAW = {
    "deep": {"config": "[" * 10**5},
    "deep_map": {"config": '{"a":' * 500 + "1" + "}" * 500},
    "nan": {"config": '{"depth": NaN}'},
    "same_key": {"config": '{"arch": "a", "arch": "b"}'},
    "long_number": {"config": '{"depth": ' + "9" * 5000 + "}"},
    "config_list": {"config": "[1]"},
    "config_text": {"config": '"vit"'},
    "config_number": {"config": "5"},
    "classes_map": {"classes": '{"a": 1}'},
    "classes_numbers": {"classes": "[1, 2]"},
    "classes_text": {"classes": '"cat"'},
    "classes_control": {"classes": '["\\u001b[31m"]'},
    "mean_text": {"mean": '"red"'},
    "mean_two": {"mean": "[0.5, 0.5]"},
    "mean_infinite": {"mean": "[1e999, 0, 0]"},
    "std_bools": {"std": "[true, true, true]"},
    "std_nested": {"transform": '{"std": [[1], [1], [1]]}'},
    "transform_list": {"transform": "[1]"},
    "task_number": {"task": "5"},
    "settings_list": {"settings": "[1]"},
    "extra_text": {"extra": '"x"'},
    "ids": {"extra": '{"category_ids": ["a"]}'},
    "categories": {"categories": '[["a", "b"]]'},
    "depth": {"config": '{"arch": "vit_nano_patch8_64", "depth": 1000000000}'},
    "width": {"backbone": '{"arch": "vit_nano_patch8_64", "embed_dim": 16384}'},
    "width_of_detector": {"settings": '{"MODEL": {"VIT": {"embed_dim": 16384, "depth": 1000}}}'},
    "unknown_key": {"config": '{"arch": "vit_nano_patch8_64", "\\u001b[31m": 1}'},
    "surrogate": {"config": '{"arch": "\\ud800"}'},
}


@pytest.mark.parametrize("kind", RAW)
def test_header(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(4)}, path, metadata=RAW[kind])
    with refused():
        read_weights(path)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
@pytest.mark.parametrize("kind", RAW)
def test_header_of_a_run(kind, task, tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"task": f'"{task}"', **RAW[kind]})
    with refused():
        load(task, tmp_path)


def load(task, folder):
    if task == "classification":
        from classification.state import load_trained
    elif task == "detection":
        from detection.state import load_trained
    else:
        from segmentation.engine import load_trained
    load_trained(folder)


BYTES = {
    "empty": b"",
    "short": b"\x01",
    "long_header": struct.pack("<Q", 2**63) + b"{}",
    "header_past_the_end": struct.pack("<Q", 1000) + b"{}",
    "no_json": struct.pack("<Q", 8) + b"not json",
    "deep": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "no_utf8": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    "offsets": struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4000]}}   ' + b"\0" * 8,
    "shape": struct.pack("<Q", 72)
    + b'{"x":{"dtype":"F32","shape":[4294967295,4294967295],"data_offsets":[0,4]}}'[:72]
    + b"\0" * 8,
    "zip": b"PK\x03\x04" * 99,
    "pickle": b"\x80\x04cos\nsystem\n(S'touch MARK'\ntR.",
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_bytes_that_are_no_weights(kind, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(f"x.{suffix}")
    path.write_bytes(BYTES[kind])
    with refused(str(path)):
        read_weights(path)
    assert not Path("MARK").exists()


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"model": x}, lambda x: [x], lambda x: {"state_dict": {"a": x}}], ids=range(4)
)
def test_pickles_are_not_run(wrap, tmp_path, mark):
    path = tmp_path / "x.pth"
    torch.save(wrap(Runs(mark)), path)
    with refused("holds more than tensors"):
        read_weights(path)
    torch.save(wrap(Runs(mark)), path, _use_new_zipfile_serialization=False)
    with refused("holds more than tensors"):
        read_weights(path)


def pretrained_places():
    """Where a config of mmengine's can name weights, as options of the command line."""
    given = {"type": "Pretrained", "checkpoint": "evil.pth"}
    return {
        "head": {"model.decode_head.init_cfg": given},
        "head_prefix": {"model.decode_head.init_cfg": {**given, "prefix": "decode_head"}},
        "head_in_a_list": {"model.decode_head.init_cfg": [{"type": "Normal", "layer": "Conv2d", "std": 0.01}, given]},
        "model": {"model.init_cfg": given},
        "backbone": {"model.backbone.init_cfg": given},
        "auxiliary": {"model.auxiliary_head.init_cfg": given},
        "override": {
            "model.decode_head.init_cfg": {
                "type": "Normal",
                "layer": "Conv2d",
                "override": {"name": "conv_seg", **given},
            }
        },
        "pretrained": {"model.pretrained": "evil.pth"},
        "url": {"model.decode_head.init_cfg": {**given, "checkpoint": "http://127.0.0.1:9/evil.pth"}},
        "torchvision": {"model.decode_head.init_cfg": {**given, "checkpoint": "torchvision://resnet50"}},
        "s3": {"model.decode_head.init_cfg": {**given, "checkpoint": "cluster:s3://evil.pth"}},
        "missing": {"model.decode_head.init_cfg": {**given, "checkpoint": "none.pth"}},
    }


@pytest.mark.parametrize("kind", pretrained_places())
def test_pretrained_goes_through_our_reader(kind, sample_data, tmp_path, mark, monkeypatch):
    from mmseg.registry import MODELS

    from segmentation.config import CONFIG_FOLDER, load_config

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Runs(mark)}, "evil.pth")
    options = {"data_root": str(sample_data / "segmentation"), "model.backbone.depth": 4, **pretrained_places()[kind]}
    with refused():
        cfg = load_config(CONFIG_FOLDER / "upernet_karkat.py", "nano", options, tmp_path)
        MODELS.build(cfg.model).init_weights()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pretrained_still_fills(suffix, tmp_path):
    from mmengine.model import BaseModule

    import segmentation  # noqa: F401

    class Module(BaseModule):
        def __init__(self, path):
            super().__init__({"type": "Pretrained", "checkpoint": str(path)})
            self.w = torch.nn.Parameter(torch.zeros(2))

    path = tmp_path / f"x.{suffix}"
    (torch.save if suffix == "pth" else save_file)({"w": torch.ones(2)}, path)
    module = Module(path)
    module.init_weights()
    assert module.w.tolist() == [1, 1]


def test_mutated_weights_are_read_or_refused(tmp_path):
    network = create_backbone("vit_nano_patch8_64", depth=1, num_classes=3)
    save_backbone(tmp_path / "good.safetensors", network, classes=["a", "b", "c"], mean=[0.5] * 3)
    torch.save({"model": network.state_dict()}, tmp_path / "good.pth")
    for suffix, tries in (("safetensors", 100), ("pth", 60)):
        raw = (tmp_path / f"good.{suffix}").read_bytes()
        path, rng, refusals = tmp_path / f"x.{suffix}", random.Random(0), 0
        for seed in range(tries):
            length = struct.unpack("<Q", raw[:8])[0] if suffix == "safetensors" else 3000
            data = mutated(raw, seed) if seed % 2 else bytearray(raw)
            if seed % 2 == 0:
                data[rng.randrange(length)] = rng.randrange(256)
            path.write_bytes(data)
            try:
                load_weights(network, path, quiet=True)
                read_metadata(path) if suffix == "safetensors" else None
            except UserError as error:
                assert "weights_only=False" not in str(error)
                refusals += 1
        assert refusals > tries / 4
