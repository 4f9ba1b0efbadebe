"""The rule for the rates of operators: a step moves each one's output by the same share, whatever its size."""

import pytest
import torch

from backbones import create_backbone
from backbones.layers.bases import BASES
from backbones.layers.karat import PROJECTIONS, KArAtOperator
from backbones.models.presets import preset_name
from backbones.training.groups import GATE, OPERATOR_STEP, describe_rates, operator_rates, parameter_groups
from backbones.utils.errors import UserError

NANO, GRID = "karat_nano_patch8_64", (8, 8)


def moved(operator, name, step):
    """Change of the output over its size when a tensor moves by ``step`` as one Adam step does, at worst.

    The gradient asks for values with a common part, the same for all queries: the signs that agree.
    """
    rows, columns = operator.grid
    n = rows * columns + operator.prefix
    q, k = torch.randn(2, 1, operator.phi.shape[0], n, 16).unbind(0)
    v = torch.randn(1, operator.phi.shape[0], n, 16) + 1
    before = operator(q, k, v, operator.grid, operator.prefix, None)
    parameter = operator.get_parameter(name)
    before[:, :, 0, 0].sum().backward()  # one number of one query
    with torch.no_grad():
        parameter += step * parameter.grad.sign()
        after = operator(q, k, v, operator.grid, operator.prefix, None)
    return ((after - before)[0, :, 0, 0].abs().mean() / before.square().mean().sqrt()).item()


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7, 7), {}),
        ((14, 14), {"harmonics": 1}),
        ((14, 14), {"harmonics": 11}),
        ((64, 64), {}),
        ((8, 8), {"rank": 2}),
        ((8, 8), {"rank": 24}),
        ((8, 8), {"order": "phi_phi"}),
        ((8, 8), {"order": "full", "harmonics": 1}),
        ((14, 14), {"order": "full"}),
        ((64, 64), {"order": "phi_w"}),
        ((8, 8), {"order": "phi_w", "harmonics": 11}),
        ((8, 8), {"diagonal": "shared"}),
        ((14, 14), {"diagonal": "positionwise", "harmonics": 11}),
        *(((8, 8), {"basis": basis}) for basis in BASES if basis != "fourier"),
    ],
    ids=str,
)
def test_a_step_moves_the_output_by_the_same_share_at_every_size(grid, options):
    torch.manual_seed(0)
    operator = KArAtOperator(2, grid, 0, **options)
    state = {name: value.clone() for name, value in operator.state_dict().items()}
    linear = {name for name, keep_sum in operator.phi.basis.names.items() if keep_sum}
    step = 1e-5  # times OPERATOR_STEP: what a step may move
    shares = []
    for name, sensitivity in operator.sensitivities().items():
        operator.load_state_dict(state)
        operator.zero_grad()
        share = moved(operator, name, step * OPERATOR_STEP / sensitivity) / (step * OPERATOR_STEP)
        assert share < 4, name  # never much more than allowed
        if name == "w" or name.rpartition(".")[2] in linear:
            shares.append(share)
    assert max(shares) > 0.2  # and what it may, but for how well signs agree


def test_one_rate_for_all_would_move_large_operators_a_thousand_times_as_far():
    def largest(grid, **options):
        return max(KArAtOperator(1, grid, 0, **options).sensitivities().values())

    assert largest((7, 7), harmonics=1) < 700
    assert largest((64, 64), harmonics=11) > 90_000
    assert largest((64, 64)) / largest((7, 7)) == pytest.approx(64**2 / 7**2, rel=0.05)  # N
    a = [KArAtOperator(1, (7, 7), 0, harmonics=g).sensitivities()["phi.a"] for g in (1, 11)]
    assert a[1] / a[0] == pytest.approx(11, rel=0.3)  # G
    w = [KArAtOperator(1, (7, 7), 0, rank=r).sensitivities()["w"] for r in (2, 24)]
    assert w[1] / w[0] == pytest.approx(12)  # r


@pytest.mark.parametrize("order", list(PROJECTIONS))
def test_every_tensor_of_an_operator_has_a_rate(order):
    attention = {"order": order, "scales": True, "base": "silu", "diagonal": "shared"}
    net = create_backbone(NANO, depth=2, attention=attention)
    rates = operator_rates(net)
    assert set(rates) == {name for name, _ in net.named_parameters() if "operator." in name}
    assert all(0 < rate <= 1 for rate in rates.values())
    assert set(operator_rates(net, 0.3).values()) == {0.3}


def test_groups_hold_each_parameter_once_with_its_rate_and_decay():
    net = create_backbone("gated_karat_nano_patch8_64", num_classes=3)
    groups = parameter_groups(net, net, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    named = dict(net.named_parameters())
    assert len(of) == len(named) == sum(len(group["params"]) for group in groups)
    rate = operator_rates(net)["blocks.5.attn.operator.phi.a"]
    assert 0 < rate < 1
    for name, lr_scale, decay in (
        ("head.weight", 1.0, 0.1),
        ("blocks.5.attn.operator.phi.a", 0.5 * rate, 0.1),
        ("blocks.4.attn.operator.phi.a", 0.25 * rate, 0.1),
        ("blocks.5.attn.gate", 0.5, 0.0),
        ("blocks.5.attn.qkv.weight", 0.5, 0.1),
        ("blocks.5.attn.qkv.bias", 0.5, 0.0),
        ("pos_embed", 0.5**7, 0.0),
    ):
        group = of[id(named[name])]
        assert (group["lr_scale"], group["weight_decay"]) == (pytest.approx(lr_scale), decay), name
    biased = parameter_groups(net, net, weight_decay=0.1, decay_biases=True)
    decays = {id(p): group["weight_decay"] for group in biased for p in group["params"]}
    assert decays[id(named["blocks.5.attn.qkv.bias"])] == 0.1
    assert decays[id(named["blocks.5.attn.gate"])] == decays[id(named["blocks.5.norm1.weight"])] == 0


def test_operators_behind_gates_move_by_as_much_more():
    alone, gated = (create_backbone(preset_name(family, "nano"), depth=2) for family in ("karat", "gated_karat"))
    for name, rate in operator_rates(alone).items():
        assert operator_rates(gated)[name] == pytest.approx(min(1.0, rate / GATE))


def test_the_literal_setting_of_the_paper_is_one_rate_for_all():
    net = create_backbone(NANO, depth=2, num_classes=3)
    assert {g["lr_scale"] for g in parameter_groups(net, net, weight_decay=0.1, operator_lr=1.0)} == {1.0}


def test_what_is_derived_is_printed():
    assert describe_rates(create_backbone("vit_nano_patch8_64", depth=2)) == ""
    text = describe_rates(create_backbone(NANO, depth=2))
    assert "derived from tokens, G, rank and order" in text
    for kind in ("phi.a", "phi.b", "w "):
        assert kind in text


@pytest.mark.parametrize("value", [0, -1.0, "quick", float("nan"), float("inf"), True, None])
def test_rates_that_are_not_positive_are_refused(value):
    net = create_backbone(NANO, depth=2)
    with pytest.raises(UserError, match=r"operator_lr is .*'derived', or a positive factor"):
        operator_rates(net, value)
