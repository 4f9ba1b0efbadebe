"""KArAt beside softmax: the network starts as the softmax network, whatever the operator, and learns to leave it."""

import pytest
import torch

from backbones import create_backbone
from backbones.checkpoint import load_weights, save_backbone
from backbones.layers.bases import BASES
from backbones.layers.karat import PROJECTIONS
from backbones.models.presets import preset_name
from backbones.utils.errors import UserError

GATED, VIT = "gated_karat_nano_patch8_64", "vit_nano_patch8_64"
PLAIN = {"kind": "softmax", "blend": "replace", "diagonal": "none"}
DENSE = {"class_token": False, "window_size": 5, "global_blocks": (1,)}


def pair(arch, attention=None, **options):
    """A blended network, and the softmax network with its weights."""
    torch.manual_seed(0)
    options = {"num_classes": 5, **({"depth": 2} if "nano_patch8" in arch else {}), **options}
    if "convit" in arch:
        options |= {"gpsa_blocks": 1}
    net = create_backbone(arch, attention=attention or {}, **options).eval()
    plain = create_backbone(net.config, attention=PLAIN).eval()
    assert not plain.load_state_dict(net.state_dict(), strict=False).missing_keys
    return net, plain


def open_gates(net, value=0.1):
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(value)


@pytest.mark.parametrize(
    ("arch", "attention", "options"),
    [
        *((GATED, {"order": order}, {}) for order in PROJECTIONS),
        *((GATED, {"basis": basis}, {}) for basis in BASES),
        (GATED, {"mode": "universal", "projection": "after"}, {}),
        (GATED, {"heads": (2, 0)}, {}),
        (GATED, {"blocks": (1,)}, {}),
        (GATED, {"diagonal": "shared"}, DENSE),
        (GATED, {"order": "phi_w"}, DENSE),
        (GATED, {"rel_pos": True}, DENSE),
        (GATED, {"kind": "polynomial"}, {}),
        ("gated_karkat_nano_patch8_64", {}, {}),
        ("gated_karat_convit_nano_patch8_64", {}, {}),
        ("gated_karat_swin_nano_patch2_window4_64", {}, {}),
        ("gated_karat_swin_nano_patch2_window4_64", {"diagonal": "positionwise", "blocks": (0, 3)}, {}),
    ],
    ids=str,
)
def test_starts_as_the_softmax_network_bit_for_bit_and_leaves_it(arch, attention, options):
    net, plain = pair(arch, attention, **options)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(net(x), plain(x))
    net(x).square().sum().backward()
    gates = {name: p for name, p in net.named_parameters() if name.endswith(".gate")}
    assert gates
    assert all((gate.grad != 0).all() for gate in gates.values())
    open_gates(net)
    assert (net(x) - plain(x)).abs().max() > 1e-6
    assert set(gates) <= net.no_weight_decay()


@pytest.mark.parametrize("family", ["karat", "karkat", "karat_convit", "karat_swin"])
def test_a_seed_gives_the_network_that_it_gives_without_the_operators(family):
    plain = {"karat": "vit", "karkat": "kat", "karat_convit": "convit", "karat_swin": "swin"}[family]
    networks, after = [], []
    for name in (f"gated_{family}", plain):
        torch.manual_seed(3)
        networks.append(create_backbone(preset_name(name, "nano"), num_classes=5).eval())
        after.append(torch.rand(()).item())
    assert after[0] == after[1]  # what is made next, as the heads of a detector, starts the same too
    gated, without = networks
    for name, tensor in without.state_dict().items():
        assert torch.equal(gated.state_dict()[name], tensor), name
    operators = [t for name, t in gated.named_parameters() if name.endswith("phi.a")]
    assert len({t.flatten()[0].item() for t in operators}) == len(operators)  # each draws its own


def test_the_sum_is_softmax_plus_gate_times_operator_per_head():
    net, _ = pair(GATED, {"heads": (2, 0)}, depth=1)
    attn, x = net.blocks[0].attn, torch.randn(2, 65, 96)
    with torch.no_grad():
        attn.gate.copy_(torch.tensor([0.5, -2.0]))  # of heads 2 and 0
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    softmax = (q @ k.transpose(-2, -1) / 32**0.5).softmax(-1) @ v
    served = attn.operator(q[:, [2, 0]], k[:, [2, 0]], v[:, [2, 0]], (8, 8), 1, None)
    expected = softmax.clone()
    expected[:, 2] += 0.5 * served[:, 0]
    expected[:, 0] -= 2 * served[:, 1]
    torch.testing.assert_close(attn.mix(q, k, v, (8, 8), 1, None, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", [GATED, "gated_karkat_nano_patch8_64"])
def test_weights_of_a_vit_keep_its_function_at_any_size(arch, tmp_path, capsys):
    family = "kat" if "karkat" in arch else "vit"
    torch.manual_seed(0)
    vit = create_backbone(f"{family}_nano_patch8_64", num_classes=0).eval()
    save_backbone(tmp_path / "vit.safetensors", vit)
    dense = {"num_classes": 0, "img_size": 128, **DENSE, "window_size": 8, "weights": str(tmp_path / "vit.safetensors")}
    net = create_backbone(arch, **dense).eval()
    assert "gates of KArAt at 0, which keeps the softmax network's function exactly" in capsys.readouterr().out
    expected = create_backbone(f"{family}_nano_patch8_64", **dense).eval()
    x = torch.randn(1, 3, 128, 96)
    assert torch.equal(net.forward_maps(x)[0], expected.forward_maps(x)[0])


def test_blended_weights_come_back_with_their_gates(tmp_path):
    net, _ = pair(GATED)
    open_gates(net)
    save_backbone(tmp_path / "net.safetensors", net)
    again = create_backbone(GATED, depth=2, num_classes=5, weights=str(tmp_path / "net.safetensors")).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_weights_of_the_other_blend_are_refused_and_change_nothing(mode, tmp_path):
    attention = {"mode": mode}
    for saved, wanted, blend in (("karat", "gated_karat", "replace"), ("gated_karat", "karat", "add")):
        net = create_backbone(f"{saved}_nano_patch8_64", depth=2, attention=attention)
        save_backbone(tmp_path / "w.safetensors", net)
        other = create_backbone(f"{wanted}_nano_patch8_64", depth=2, attention=attention)
        before = {name: t.clone() for name, t in other.state_dict().items()}
        with pytest.raises(UserError, match=rf"attention\.blend '{blend}'.*Set attention\.blend='{blend}'"):
            load_weights(other, tmp_path / "w.safetensors")
        assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_gates_of_other_heads_are_refused(tmp_path):
    save_backbone(tmp_path / "w.safetensors", create_backbone(GATED, depth=2))
    with pytest.raises(UserError, match=r"3 gates in blocks\.0\.attn, and attention\.heads gives 2 heads"):
        create_backbone(GATED, depth=2, attention={"heads": (0, 1)}, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "softmax", "blend": "add"}, r"blend is 'add', and attention\.kind 'softmax'"),
        ({"kind": "karat", "blend": "mix"}, r"attention\.blend.*'mix'.*replace.*add"),
        ({"kind": "karat", "blend": "add", "heads": (3,)}, r"attention\.heads holds 3; there are heads 0 to 2"),
        ({"kind": "karat", "blend": "add", "heads": ()}, r"attention\.heads is \(\)"),
        ({"kind": "softmax", "diagonal": "shared"}, r"diagonal is 'shared'; it needs attention\.kind 'karat'"),
        ({"kind": "karat", "diagonal": "shared", "projection": "after"}, r"diagonal is 'shared'.*projection"),
        ({"kind": "karat", "diagonal": "one"}, r"attention\.diagonal.*'one'.*positionwise"),
    ],
)
def test_what_has_no_sense_is_refused(attention, message):
    with pytest.raises(UserError, match=message):
        create_backbone(VIT, attention=attention)


def test_full_is_refused_where_it_does_not_fit_into_memory():
    with pytest.raises(UserError, match=r"order 'full'.*block 0 has 4096 tokens; at most 1024"):
        create_backbone(GATED, img_size=512, class_token=False, attention={"order": "full"})
    small = create_backbone(GATED, depth=1, class_token=False, attention={"order": "full"})
    with pytest.raises(UserError, match=r"has 1089 tokens; at most 1024"):
        small(torch.randn(1, 3, 264, 264))
