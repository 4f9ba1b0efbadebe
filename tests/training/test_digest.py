"""Every byte of a checkpoint and of weights counts: one that flips is seen."""

import random

import pytest
import torch

from backbones.checkpoint import read_tensors
from backbones.training.state import Header, load_model, read_checkpoint, read_header, save_checkpoint, save_model
from backbones.utils.errors import UserError

TENSORS = {"a.weight": torch.randn(20, 30), "a.bias": torch.zeros(7), "steps": torch.tensor(3)}
HEADER = Header("classification", {"arch": "x"}, {"lr": 1e-3}, ["cat", "dog"], {"mean": [0.5] * 3}, {"more": [1]})


@pytest.fixture
def files(tmp_path):
    save_model(tmp_path / "model.safetensors", TENSORS, HEADER)
    save_checkpoint(tmp_path / "checkpoint.pth", {"task": "classification", "model": TENSORS, "step": 3})
    return tmp_path


def flipped(path, seed):
    """Changes one bit of one byte, anywhere in the file."""
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def test_what_was_written_is_read(files):
    header = read_header(files / "model.safetensors", "classification")
    assert (header.classes, header.settings, header.extra) == (["cat", "dog"], {"lr": 1e-3}, {"more": [1]})
    assert "torch" in header.versions
    for state in (load_model(files / "model.safetensors"), read_checkpoint(files / "checkpoint.pth")["model"]):
        assert all(torch.equal(state[name], tensor) for name, tensor in TENSORS.items())
    assert read_checkpoint(files / "checkpoint.pth")["step"] == 3
    assert sorted(p.name for p in files.iterdir()) == ["checkpoint.pth", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
def test_each_of_200_flipped_bytes_is_found(files, name):
    path, found = files / name, 0
    whole = path.read_bytes()
    for seed in range(200):
        flipped(path, seed)
        with pytest.raises(UserError):
            if path.suffix == ".pth":
                read_checkpoint(path)
            else:
                read_header(path, "classification")
                load_model(path)
        found += 1
        path.write_bytes(whole)
    assert found == 200


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_found(files, name, share):
    path = files / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path) if path.suffix == ".pth" else load_model(path)


def test_weights_without_a_digest_from_elsewhere_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_tensors(tmp_path / "other.safetensors")["a.weight"], TENSORS["a.weight"])


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path):
    from safetensors.torch import save_file

    bad = {**TENSORS, "a.bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(UserError, match=r"a\.bias holds NaN"):
        save_model(tmp_path / "model.safetensors", bad, HEADER)
    assert not list(tmp_path.iterdir())
    save_file(bad, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"a\.bias holds NaN"):
        load_model(tmp_path / "other.safetensors")


def test_the_weights_of_another_task_are_refused(files):
    with pytest.raises(UserError, match=r"'classification'.*needs one of 'detection'"):
        read_header(files / "model.safetensors", "detection")


def test_a_checkpoint_of_another_version_or_a_pickle_is_refused(tmp_path):
    torch.save({"step": 1}, tmp_path / "old.pth")
    with pytest.raises(UserError, match="another version"):
        read_checkpoint(tmp_path / "old.pth")
    torch.save({"format": 2, "object": random.Random(0)}, tmp_path / "pickle.pth")
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "pickle.pth")
    assert "weights_only" not in str(error.value)
