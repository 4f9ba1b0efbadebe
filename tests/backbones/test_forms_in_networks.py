"""Networks of every form train in bfloat16, compile in one graph and export to plain operators."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from backbones import create_backbone
from backbones.layers.bases import BASES
from backbones.layers.karat import PROJECTIONS

NETWORKS = [
    ("karat_nano_patch8_64", {}),
    ("karat_nano_patch8_64", {"order": "phi_w"}),
    ("karat_nano_patch8_64", {"basis": "morlet", "base": "silu"}),
    ("karat_nano_patch8_64", {"projection": "after", "heads": (1,)}),
    ("karat_swin_nano_patch2_window4_64", {}),
    ("karat_convit_nano_patch8_64", {}),
    ("vit_nano_patch8_64", {"kind": "relu"}),
]


def network(name, attention):
    shallow = {"stage_depths": (2,)} if "swin" in name else {"depth": 2}
    shallow |= {"gpsa_blocks": 1} if "convit" in name else {}
    return create_backbone(name, num_classes=3, attention=attention, **shallow).eval()


@pytest.mark.parametrize(("name", "attention"), NETWORKS, ids=str)
def test_compiles_in_one_graph_and_exports_to_plain_operators(name, attention):
    torch._dynamo.reset()
    net = network(name, attention)
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(net, (x,))
        assert "karvis" not in exported.graph_module.code
        torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis", ["mexican_hat", "bspline"])
def test_compiled_functions_give_the_same_in_a_copy_too(basis, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor takes a minute
    torch.manual_seed(0)
    plain = network("karat_nano_patch8_64", {"basis": basis})
    compiled = network("karat_nano_patch8_64", {"basis": basis, "compiled": True})
    compiled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    expected = plain(x)
    expected.square().sum().backward()
    for net in (compiled, deepcopy(compiled)):  # as the average of weights is one
        out = net(x)
        out.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", list(PROJECTIONS))
@pytest.mark.parametrize("basis", BASES)
def test_every_form_trains_in_bfloat16(basis, order):
    """Ten steps on one batch: every loss and gradient finite, and the loss falls."""
    torch.manual_seed(0)
    attention = {"basis": basis, "order": order, "base": "silu", "drop_rate": 0.1}
    net = create_backbone("karat_nano_patch8_64", img_size=32, num_classes=4, depth=1, attention=attention)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
