"""What is logged of KArAt's operators: scores, outputs, the change by a step, gates, and gradients by part."""

import pytest
import torch

from backbones import create_backbone
from backbones.training.monitor import OperatorMonitor, gradient_norms


def step(net, optimizer, monitor=None, watched=True):
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4) % 3
    if monitor and watched:
        monitor.watch()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    return monitor.values() if monitor else {}


def made(arch, **attention):
    torch.manual_seed(0)
    net = create_backbone(arch, depth=2, num_classes=3, attention=attention)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, OperatorMonitor(net, net, optimizer)


def test_values_are_those_of_the_step():
    net, optimizer, monitor = made("karat_nano_patch8_64")
    seen = {}
    operator = net.blocks[1].attn.operator

    def keep(_, args, out):
        seen.setdefault("call", (args, out.detach()))

    hook = operator.register_forward_hook(keep)
    values = step(net, optimizer, monitor)
    hook.remove()
    args, out = seen["call"]  # the first is the training's own
    q, k, v = (t[:1].detach() for t in args[:3])
    scores = q[0, 0] @ k[0, 0].T / 32**0.5
    before, after = out[:1], operator(q, k, v, *args[3:]).detach()
    assert values["blocks.1.attn/score_max"] == pytest.approx(scores.abs().max().item(), rel=1e-4)
    assert values["blocks.1.attn/score_std"] == pytest.approx(scores.std().item(), rel=1e-4)
    assert values["blocks.1.attn/output"] == pytest.approx((before.norm() / v.norm()).item(), rel=1e-3)
    assert values["blocks.1.attn/step"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
    assert values["blocks.1.attn/step"] > 0
    norms = {name: norm for name, norm in values.items() if name.startswith("grad_norm/")}
    squares = sum(p.grad.square().sum() for p in net.parameters())
    assert sum(n**2 for n in norms.values()) == pytest.approx(squares.item(), rel=1e-4)
    assert {"grad_norm/operator.phi", "grad_norm/operator.w", "grad_norm/attention.qkv", "grad_norm/rest"} <= set(norms)


def test_gates_are_shown_where_there_are_some():
    net, optimizer, monitor = made("gated_karat_nano_patch8_64", heads=(0, 2), diagonal="shared")
    values = step(net, optimizer, monitor)
    gate = net.blocks[0].attn.gate
    assert values["blocks.0.attn/gate"] == pytest.approx(gate.abs().mean().item())
    assert values["blocks.0.attn/gate"] > 0
    assert {"grad_norm/attention.gate", "grad_norm/operator.psi"} <= set(values)


def test_training_is_the_same_bit_for_bit_and_free_where_nothing_is_watched():
    results = []
    for watch in (None, False, True):
        net, optimizer, monitor = made("karat_nano_patch8_64", drop_rate=0.2)
        for _ in range(2):
            values = step(net, optimizer, monitor if watch is not None else None, watched=bool(watch))
            assert bool(values) == bool(watch)
        results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("arch", ["vit_nano_patch8_64", "kat_nano_patch8_64"])
def test_networks_without_operators_log_nothing(arch):
    assert step(*made(arch)) == {}


def test_universal_operators_windows_and_swin_are_watched():
    net, optimizer, monitor = made("karat_nano_patch8_64", mode="universal")
    assert step(net, optimizer, monitor)["operator/step"] > 0
    net = create_backbone("karat_swin_nano_patch2_window4_64", num_classes=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert step(net, optimizer, OperatorMonitor(net, net, optimizer))["layers.3.blocks.1.attn/step"] > 0


def test_norms_by_part_leave_nothing_out():
    net, optimizer, _ = made("gated_karat_nano_patch8_64")
    step(net, optimizer)
    total = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm().item()
    assert sum(n**2 for n in gradient_norms(net).values()) ** 0.5 == pytest.approx(total, rel=1e-4)
