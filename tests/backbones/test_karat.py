"""Every form of KArAt equals the sums it stands for, number by number, and refuses what is not defined."""

import itertools
import math

import pytest
import torch

from backbones import create_backbone
from backbones.layers.bases import BASES, SPLINE_RANGE
from backbones.layers.karat import PROJECTIONS, KArAtOperator

ORDERS = list(PROJECTIONS)


def bspline(i, k, x, knots):
    if k == 0:
        return 1.0 if knots[i] <= x < knots[i + 1] else 0.0
    left = (x - knots[i]) / (knots[i + k] - knots[i]) * bspline(i, k - 1, x, knots)
    return left + (knots[i + k + 1] - x) / (knots[i + k + 1] - knots[i + 1]) * bspline(i + 1, k - 1, x, knots)


def meyer(x):
    def nu(t):
        t = min(max(t, 0), 1)
        return t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)

    t = nu(abs(x))
    m = 1 if t <= 0.5 else math.cos(math.pi / 2 * nu(2 * t - 1)) if t < 1 else 0
    return math.sin(math.pi * abs(x)) * m


def spline_sum(x, c):
    step = 2 * SPLINE_RANGE / (len(c["c"]) - 3)
    knots = [-SPLINE_RANGE + step * j for j in range(-3, len(c["c"]) + 1)]
    return sum(value * bspline(i, 3, x, knots) for i, value in enumerate(c["c"]))


def waves(psi):
    return lambda x, c: c["w"] * psi((x - c["tau"]) / c["s"])


# φ(x) from one function's numbers, in the paper's words.
FORMULAS = {
    "fourier": lambda x, c: sum(
        a * math.cos(m * x) + b * math.sin(m * x) for m, (a, b) in enumerate(zip(c["a"], c["b"], strict=True), 1)
    ),
    "rational": lambda x, c: (
        sum(a * x**i for i, a in enumerate(c["numerator"]))
        / (1 + abs(sum(b * x**j for j, b in enumerate(c["denominator"], 1))))
    ),
    "mexican_hat": waves(
        lambda x: 2 / (math.pi**0.25 * math.sqrt(3)) * (x * x - 1) * math.exp(-x * x / 2),
    ),
    "morlet": waves(lambda x: math.cos(5 * x) * math.exp(-x * x / 2)),
    "dog": waves(lambda x: x * math.exp(-x * x / 2)),
    "shannon": waves(lambda x: math.sin(x) / x if x else 1.0),
    "meyer": waves(meyer),
    "bspline": spline_sum,
}
BETA = {
    "zero": lambda x: 0.0,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
}


def naive_function(functions, basis, base, h, p, q, factor):
    """φ_pq of head h as a Python function."""
    c = {name: getattr(functions, name)[h, ..., p, q].tolist() for name in BASES[basis].names}
    inputs = functions.shape[2]
    window = 0.54 - 0.46 * math.cos(2 * math.pi * q / (inputs - 1)) if basis == "shannon" else 1.0
    scale_base, scale_basis = 1.0, 1.0
    if functions.scales:
        scale_base, scale_basis = (t[h, p, q].item() for t in (functions.scale_base, functions.scale_basis))
    return lambda x: scale_base * factor * BETA[base](x) + scale_basis * window * FORMULAS[basis](x, c)


def naive_simplex(y):
    """By bisection of λ in Σ (y − λ)₊ = 1."""
    low, high = min(y) - 1, max(y)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(v - middle, 0) for v in y) > 1 else (low, middle)
    return [max(v - low, 0) for v in y]


def naive_attention(operator, basis, base, q, k, v, mask):
    out = torch.zeros_like(q)
    for i, h in itertools.product(*map(range, q.shape[:2])):
        real = [t for t in range(q.shape[2]) if mask is None or mask[i, t]]
        rows = naive_weights(operator, basis, base, h, real)
        for row in range(q.shape[2]):
            weights = rows({t: (q[i, h, row] @ k[i, h, t]).item() / q.shape[3] ** 0.5 for t in real})
            for p in real:
                out[i, h, row] += weights[p] * v[i, h, p]
    return out


def naive_weights(operator, basis, base, h, real):
    """The function from a row of scores {key: score} to a row of attention weights {key: weight} of head h."""
    order, projection, ranks = operator.order, operator.projection, range(operator.rank)

    def functions(matrix, outputs, inputs):
        factor = matrix.base_factor
        made = {pq: naive_function(matrix, basis, base, h, *pq, factor) for pq in itertools.product(outputs, inputs)}
        return lambda z: {p: sum(made[p, t](z[t]) for t in inputs) for p in outputs}

    def linear(w, outputs, inputs):
        return lambda z: {p: sum(w[h, p, t].item() * z[t] for t in inputs) for p in outputs}

    if order == "full":
        steps = [functions(operator.phi, real, real)]
    elif order == "w_phi":
        steps = [functions(operator.phi, ranks, real), linear(operator.w, real, ranks)]
    elif order == "phi_w":
        steps = [linear(operator.w, ranks, real), functions(operator.phi, real, ranks)]
    else:
        steps = [functions(operator.phi, ranks, real), functions(operator.phi2, real, ranks)]
    project = {"none": None, "before": 1, "after": len(steps)}[projection]
    if project is not None:
        steps.insert(project, lambda z: dict(zip(z, naive_simplex(list(z.values())), strict=True)))

    def row(z):
        for step in steps:
            z = step(z)
        return z

    return row


def operator_and_tokens(seed=0, **settings):
    """An operator of 2x2 tokens and a class token in float64 with nothing left at its start, and q, k, v."""
    torch.manual_seed(seed)
    operator = KArAtOperator(2, (2, 2), 1, harmonics=3, rank=2, **settings).double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return operator, [torch.randn(2, 2, 5, 3, dtype=torch.float64) for _ in range(3)]


MASK = torch.tensor([[True] * 5, [True, False, True, True, False]])


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", BASES)
def test_every_basis_in_every_order_equals_its_double_loop(basis, order, masked):
    operator, tokens = operator_and_tokens(basis=basis, order=order, scales=True, base="silu")
    mask = MASK if masked else None
    out = operator(*tokens, (2, 2), 1, mask)
    assert (out - naive_attention(operator, basis, "silu", *tokens, mask)).abs().max() < 1e-10


@pytest.mark.parametrize("base", BETA)
def test_every_base_function_equals_its_double_loop(base):
    operator, tokens = operator_and_tokens(base=base)
    out = operator(*tokens, (2, 2), 1, MASK)
    assert (out - naive_attention(operator, "fourier", base, *tokens, MASK)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("order", "projection"), [(o, p) for o, allowed in PROJECTIONS.items() for p in allowed if p != "none"]
)
@pytest.mark.parametrize("basis", ["fourier", "dog"])
def test_every_projection_equals_its_double_loop(basis, order, projection):
    operator, tokens = operator_and_tokens(basis=basis, order=order, projection=projection)
    out = operator(*tokens, (2, 2), 1, MASK)
    assert (out - naive_attention(operator, basis, "zero", *tokens, MASK)).abs().max() < 1e-10


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", BASES)
def test_every_form_passes_finite_differences(basis, order):
    """In q, k, v and in every parameter; projections have tests of their own."""
    operator, tokens = operator_and_tokens(basis=basis, order=order, scales=True, base="gelu")
    tokens = [t[:1, :, :, :2].contiguous().requires_grad_() for t in tokens]
    names, values = zip(*operator.named_parameters(), strict=True)

    def run(*inputs):
        q, k, v, *parameters = inputs
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(operator, state, (q, k, v, (2, 2), 1, MASK[1:]))

    assert torch.autograd.gradcheck(run, (*tokens, *values), fast_mode=True)


@pytest.mark.parametrize(("order", "projection"), [("w_phi", "before"), ("w_phi", "after"), ("phi_w", "after")])
def test_projected_forms_pass_finite_differences(order, projection):
    operator, tokens = operator_and_tokens(order=order, projection=projection)
    tokens = [t[:1].requires_grad_() for t in tokens]
    assert torch.autograd.gradcheck(lambda *t: operator(*t, (2, 2), 1, MASK[1:]), tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", BASES)
def test_nothing_of_size_n_n_r_is_made(basis, order, monkeypatch):
    """With blocks of 4096 numbers no tensor exceeds a block or the weights themselves, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from backbones.ops import rows
    from backbones.ops.fourier_attention import blocked

    monkeypatch.setitem(rows._BLOCK, "cpu", 4096)
    monkeypatch.setitem(blocked._BLOCK_BYTES, "cpu", 4 * 4096)
    n, rank, heads = (8 * 8, 8, 2) if order != "full" else (6 * 6, 36, 2)
    side = math.isqrt(n)
    operator = KArAtOperator(heads, (side, side), 0, basis, 3, 8, order)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.numel())
            return out

    tokens = [torch.randn(1, heads, n, 8, requires_grad=True) for _ in range(3)]
    with Watch():
        operator(*tokens, (side, side), 0, None).sum().backward()
    parameters = max(p.numel() for p in operator.parameters())
    per_query = heads * n * rank * 12  # linear in N: what phi_w holds of a query, or a block of one query of both heads
    assert largest[0] <= max(4096, parameters, per_query) < heads * n * n * rank


def test_heads_and_blocks_left_to_softmax():
    net = create_backbone("karat_nano_patch8_64", num_classes=0, depth=2, attention={"heads": (2, 0), "blocks": (1,)})
    net = net.eval()
    attention, operator = net.blocks[1].attn, net.blocks[1].attn.operator
    assert not hasattr(net.blocks[0].attn, "operator")
    assert operator.phi.shape[0] == 2
    q, k, v = torch.randn(3, 2, 3, 65, 32).unbind(0)
    mixed = attention.mix(q, k, v, (8, 8), 1, None, None)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours = operator(*(t[:, [2, 0]] for t in (q, k, v)), (8, 8), 1, None)
    torch.testing.assert_close(mixed[:, 1], softmax[:, 1])
    torch.testing.assert_close(mixed[:, [2, 0]], ours)


def test_grid_and_rank_of_each_block():
    net = create_backbone("karat_nano_patch8_64", depth=3, attention={"grid": [1, 3, 2], "rank": [12, 4, 8]})
    assert [b.attn.operator.phi.a.shape[1:3] for b in net.blocks] == [(1, 12), (3, 4), (2, 8)]
    net(torch.randn(1, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("order", ["w_phi", "phi_w", "phi_phi", "full"])
def test_dropout_acts_in_training_only(order):
    operator, tokens = operator_and_tokens(order=order, drop_rate=0.5)
    assert not torch.equal(operator(*tokens, (2, 2), 1, None), operator(*tokens, (2, 2), 1, None))
    operator.eval()
    expected = naive_attention(operator, "fourier", "zero", *tokens, None)
    torch.testing.assert_close(operator(*tokens, (2, 2), 1, None), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("basis", BASES)
def test_start_keeps_the_variance_of_the_values(basis, order):
    """Scores of variance 1 in, values of variance 1 out, within the noise of 16 heads."""
    torch.manual_seed(0)
    n = 49 if order == "full" else 197
    side = math.isqrt(n)
    operator = KArAtOperator(16, (side, side), n - side * side, basis, 3, 12, order)
    q, k, v = torch.randn(3, 2, 16, n, 32).unbind(0)
    with torch.no_grad():
        variance = operator(q, k, v, (side, side), n - side * side, None).var().item()
    assert 0.4 < variance < 2.5


def test_papers_start_is_literal():
    operator = KArAtOperator(4, (14, 14), 1, init="paper")
    assert operator.phi.a.std().item() == pytest.approx(1, abs=0.05)
    assert operator.w.abs().max() <= 12**-0.5


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("polynomial", lambda s, n: s**3 / n**0.5),
        ("relu", lambda s, n: s.clamp(min=0) / n),
    ],
)
def test_rivals_equal_their_formula(kind, formula):
    net = create_backbone("vit_nano_patch8_64", num_classes=0, depth=1, attention={"kind": kind})
    q, k, v = torch.randn(3, 2, 3, 7, 32, dtype=torch.float64).unbind(0)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    out = net.blocks[0].attn.mix(q, k, v, (2, 3), 1, mask, None)
    for i, n in ((0, 7), (1, 5)):
        s = q[i] @ k[i, :, :n].transpose(-2, -1) / 32**0.5
        torch.testing.assert_close(out[i], formula(s, n) @ v[i, :, :n])


@pytest.mark.parametrize("kind", ["polynomial", "relu"])
def test_rivals_train_with_dropout(kind):
    net = create_backbone("vit_nano_patch8_64", num_classes=3, depth=1, attention={"kind": kind, "drop_rate": 0.2})
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rank", [12, 8, 4, 2])
@pytest.mark.parametrize(("size", "heads", "harmonics"), [("tiny", 3, 3), ("small", 6, 3), ("base", 12, 1)])
def test_parameters_and_macs_of_the_papers_tables(size, heads, harmonics, rank):
    """(2G+3)·N·r parameters per head and (3G+1)·N²·r·h·L multiply-accumulates, N = 197, L = 12."""
    with torch.device("meta"):
        plain = create_backbone(f"vit_{size}_patch16_224")
        net = create_backbone(f"karat_{size}_patch16_224", attention={"rank": rank, "scales": True})
    extra = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 12 * heads * (2 * harmonics + 3) * 197 * rank
    macs = sum(operator.macs(197) for operator in net.operators().values())
    assert macs == (3 * harmonics + 1) * 197**2 * rank * heads * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "haar"}, "attention.basis is 'haar'; allowed: 'fourier', 'rational'"),
        ({"base": "relu"}, "attention.base is 'relu'; allowed: 'zero', 'identity', 'silu', 'gelu'"),
        ({"order": "w_phi_w"}, "attention.order is 'w_phi_w'; allowed: 'w_phi', 'phi_w', 'phi_phi', 'full'"),
        ({"order": "phi_w", "projection": "before"}, "attention.order 'phi_w' allows 'none' or 'after'"),
        ({"projection": "simplex"}, "attention.order 'w_phi' allows 'none' or 'before' or 'after'"),
        ({"rank": 66}, "attention.rank 66 exceeds the 65 tokens"),
        ({"rank": [4, 4]}, "attention.rank has 2 values; the backbone has 6 blocks"),
        ({"grid": [1] * 6, "mode": "universal"}, "mode 'universal' shares one operator"),
        ({"grid": 0}, "attention.grid is 0; it must be a positive integer"),
        ({"heads": [3]}, "attention.heads holds 3; there are heads 0 to 2"),
        ({"heads": []}, "name each head once"),
        ({"drop_rate": 2}, "attention.drop_rate is 2; it must be between 0 and 1"),
        ({"rel_pos": True}, "attention.rel_pos is defined for softmax scores only, and every block uses 'karat'"),
    ],
)
def test_settings_that_are_not_defined_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("karat_nano_patch8_64", attention=settings)


def test_operator_names_what_it_refuses():
    with pytest.raises(ValueError, match=r"rank is 12; it must be at most 5"):
        KArAtOperator(2, (2, 2), 1)
    with pytest.raises(ValueError, match="projection for order 'full' is 'before'; allowed: 'none', 'after'"):
        KArAtOperator(2, (2, 2), 1, order="full", projection="before")
    operator, tokens = operator_and_tokens()
    with pytest.raises(ValueError, match="5 tokens are not 1 class tokens and a grid of 3x3"):
        operator(*tokens, (3, 3), 1, None)
