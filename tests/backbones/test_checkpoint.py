"""Loading weights: other sizes, windows, wrappers, timm's and MAE's files, and what is refused."""

from pathlib import Path

import pytest
import timm
import torch

from backbones import create_backbone
from backbones.checkpoint import load_weights, read_metadata, save_backbone
from backbones.layers.resample import resample_tokens


@pytest.fixture
def trained(tmp_path):
    net = create_backbone("karkat_nano_patch8_64", num_classes=5)
    save_backbone(tmp_path / "model.safetensors", net, classes=list("abcde"))
    return net, tmp_path / "model.safetensors"


def test_a_saved_network_loads_exactly_and_knows_its_config(trained):
    net, path = trained
    again = create_backbone("karkat_nano_patch8_64", num_classes=5, weights=str(path))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again.eval()(x), net.eval()(x), rtol=0, atol=0)
    assert read_metadata(path)["classes"] == list("abcde")


def test_a_classifier_becomes_a_windowed_dense_backbone(trained, capsys):
    net, path = trained
    dense = create_backbone(
        "karkat_nano_patch8_64",
        num_classes=0,
        final_norm=False,
        img_size=128,
        class_token=False,
        window_size=8,
        global_blocks=(2, 5),
        weights=str(path),
    )
    report = capsys.readouterr().out
    assert "100.0% of" in report
    assert "pos_embed [1, 65, 96]->[1, 256, 96]" in report
    # Windows of 8x8 have the pretraining's grid: the operator is the same but for its class token.
    torch.testing.assert_close(dense.blocks[0].attn.operator.phi.a, net.blocks[0].attn.operator.phi.a[..., 1:])
    # The global block's operator is resampled, and keeps its sum over the grid.
    torch.testing.assert_close(
        dense.blocks[2].attn.operator.phi.a.sum(-1),
        net.blocks[2].attn.operator.phi.a[..., 1:].sum(-1),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("new", [(16, 16), (12, 20), (5, 7)])
def test_resampling_leaves_sums_over_tokens_unchanged(new):
    t = torch.randn(3, 65, dtype=torch.float64)
    out = resample_tokens(t, (8, 8), new, 1, 1, keep_sum=True)
    assert out.shape == (3, 1 + new[0] * new[1])
    torch.testing.assert_close(out[:, 1:].sum(1), t[:, 1:].sum(1))
    torch.testing.assert_close(out[:, 0], t[:, 0])


def test_resampling_follows_the_grids_rows_and_columns():
    rows = torch.arange(4.0).repeat_interleave(4)[None]  # varies down the rows only
    out = resample_tokens(rows, (4, 4), (4, 8), 0, 0, keep_sum=False).view(4, 8)
    torch.testing.assert_close(out, torch.arange(4.0)[:, None].expand(4, 8))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.net."])
def test_wrapped_and_prefixed_state_dicts_load(tmp_path, wrap, prefix):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    torch.save(wrap({prefix + k: v for k, v in source.state_dict().items()}), tmp_path / "vit.pth")
    report = load_weights(create_backbone("vit_tiny_patch16_224", num_classes=10), tmp_path / "vit.pth")
    assert report.share == 1.0
    assert not report.missing


def test_deit_and_mae_checkpoints_load(tmp_path):
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10)
    torch.save(distilled.state_dict(), tmp_path / "deit.pth")
    net = create_backbone("vit_tiny_patch16_224", num_classes=10)
    report = load_weights(net, tmp_path / "deit.pth")
    assert report.share == 1.0
    assert "dist_token" in report.left_out
    torch.testing.assert_close(net.pos_embed[:, :1], distilled.pos_embed[:, :1])
    torch.testing.assert_close(net.pos_embed[:, 1:], distilled.pos_embed[:, 2:])

    encoder = create_backbone("vit_tiny_patch16_224", num_classes=0).state_dict()
    mae = {**encoder, "decoder_pos_embed": torch.zeros(1, 197, 8), "mask_token": torch.zeros(1, 1, 8)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    report = load_weights(create_backbone("vit_tiny_patch16_224", num_classes=10), tmp_path / "mae.pth")
    assert report.share == 1.0
    assert sorted(report.left_out) == ["decoder_pos_embed", "mask_token"]


def test_a_vit_loads_into_kat_but_not_unasked_into_karat(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    create_backbone("kat_tiny_patch16_224", weights=str(tmp_path / "vit.pth"))
    with pytest.raises(ValueError, match=r"(?s)less than 90%.*weights_min_match=0.87"):
        create_backbone("karat_tiny_patch16_224", attention={"scales": True}, weights=str(tmp_path / "vit.pth"))
    create_backbone("karat_tiny_patch16_224", weights=str(tmp_path / "vit.pth"), weights_min_match=0.85)


def test_weights_by_timm_name(monkeypatch):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source if pretrained else create(name))
    net = create_backbone("vit_tiny_patch16_224", num_classes=10, weights="vit_tiny_patch16_224.augreg_in21k")
    torch.testing.assert_close(net.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)


def test_the_network_is_unchanged_when_the_checkpoint_is_refused(trained):
    _, path = trained
    net = create_backbone("karat_nano_patch8_64", embed_dim=48)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="another model"):
        load_weights(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_damaged_foreign_and_missing_files_end_with_one_message(tmp_path, trained):
    _, path = trained
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"model": {"fc.weight": torch.ones(2)}}, tmp_path / "other.pth")

    torch.save({"model": Path("anything")}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    net = create_backbone("karkat_nano_patch8_64")
    for name, message in [
        ("cut.safetensors", "cannot read"),
        ("cut.pth", "cannot read|holds more"),
        ("other.pth", "not the checkpoint of a ViT"),
        ("code.pth", "nothing else is unpickled"),
        ("empty.pth", "holds no state dict"),
        ("absent.pth", "neither a file nor a timm model"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(net, tmp_path / name)
