"""Damaged, foreign and non-finite weights and checkpoints are refused in one message: at load, in training, after."""

import random
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tasks import TASKS

from backbones.checkpoint import read_metadata
from backbones.training import state
from backbones.utils.errors import UserError
from backbones.utils.files import save_weights


def load(name, path):
    """The task's own way to build what it trained."""
    if name == "classification":
        from classification.state import load_trained

        return load_trained(path)[0]
    if name == "detection":
        from detection.state import load_trained

        return load_trained(path, "cpu")[0]
    from segmentation.engine import load_trained

    return load_trained(path.parent, "cpu")


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def flip(path, seed):
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    place = draw.randrange(len(data))
    data[place] = (data[place] + draw.randrange(1, 256)) % 256
    path.write_bytes(bytes(data))


def test_what_was_trained_loads(task, copied):
    network = load(task.name, copied / "model.safetensors")
    assert not network.training


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_in_the_checkpoint_is_found(task, copied, seed):
    flip(copied / "checkpoint.pth", seed)
    with pytest.raises(UserError, match=r"damaged|another version"):
        task.train(copied, resume=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_in_the_weights_is_found(task, copied, seed):
    flip(copied / "model.safetensors", seed)
    with pytest.raises(UserError):
        load(task.name, copied / "model.safetensors")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "checkpoint.pth"])
def test_200_changed_bytes_are_all_found(task, copied, name):
    path = copied / name
    original = path.read_bytes()
    for seed in range(200):
        flip(path, seed)
        with pytest.raises(UserError):
            if path.suffix == ".pth":
                state.read_checkpoint(path)
            else:
                state.read_header(path, task.name)
                state.load_model(path)
        path.write_bytes(original)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
def test_a_file_cut_short_is_found(task, copied, name, share):
    path = copied / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"damaged|another version|safetensors"):
        load(task.name, path) if name == "model.safetensors" else task.train(copied, resume=True)


def test_the_weights_of_another_task_are_refused(task, copied, tmp_path):
    other = next(name for name in TASKS if name != task.name)
    with pytest.raises(UserError, match=f"of the task '{task.name}'; this needs one of '{other}'"):
        load(other, copied / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(task, copied, value):
    path = copied / "model.safetensors"
    tensors, metadata = load_file(path), read_metadata(path)
    name = next(n for n in tensors if tensors[n].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_weights(path, tensors, {k: v for k, v in metadata.items() if k in state.Header.__dataclass_fields__})
    with pytest.raises(UserError, match=r"holds NaN or infinity"):
        load(task.name, path)


def test_weights_that_are_not_finite_are_refused_where_a_run_starts(task, copied, tmp_path):
    from backbones import create_backbone
    from backbones.checkpoint import save_backbone

    depth = {"segmentation": 6}.get(task.name, 2)
    classifier = create_backbone("karkat_nano_patch8_64", depth=depth)
    with torch.no_grad():
        classifier.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    save_backbone(tmp_path / "classifier.safetensors", classifier)
    name = {"classification": "model.weights", "detection": "MODEL.VIT.weights"}.get(
        task.name, "model.backbone.weights"
    )
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1\.weight holds NaN"):
        task.train(tmp_path / "new", {name: str(tmp_path / "classifier.safetensors")})


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(task, whole, tmp_path):
    """The last block's weights become NaN after the third step."""
    from backbones.models import vit

    folder, calls, real = tmp_path / "run", [], vit.VisionTransformer.forward_maps
    name = "forward_maps" if task.name != "classification" else "forward_features"
    real = getattr(vit.VisionTransformer, name)

    def poisoned(self, x, *args, **kwargs):
        if self.training:
            calls.append(None)
        out = real(self, x, *args, **kwargs)
        broken = len(calls) > 5
        return (
            ([m * float("nan") for m in out] if isinstance(out, list | tuple) else out * float("nan"))
            if broken
            else out
        )

    with mock.patch.object(vit.VisionTransformer, name, poisoned), pytest.raises(UserError, match=r"nan|finite"):
        task.train(folder)
    assert not (folder / "metrics.json").exists()
    state.check_finite(state.read_checkpoint(folder / "checkpoint.pth")[_model(task)], "the checkpoint")


def _model(task):
    return "state_dict" if task.name == "segmentation" else "model"


def test_an_evaluation_that_is_not_finite_ends_with_one_message(task, copied):
    """As after training that diverged without a word: the weights of the checkpoint are not finite."""
    saved = torch.load(copied / "checkpoint.pth", weights_only=True)
    model = saved[_model(task)]
    name = next(n for n in model if n.endswith("blocks.1.mlp.fc1.weight"))
    for tensors in (model, saved.get("ema") or {}):
        if name in tensors:
            tensors[name].view(-1)[0] = float("nan")
    state.save_checkpoint(copied / "checkpoint.pth", saved)
    before = (copied / "metrics.json").read_bytes()
    with pytest.raises(UserError, match=r"finite|NaN"):
        task.train(copied, resume=True)
    assert (copied / "metrics.json").read_bytes() == before
