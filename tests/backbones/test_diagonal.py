"""ψ_p(S_kp) beside the modular form: the sum it stands for, its start, masks, resolutions and memory."""

import pytest
import torch

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.layers.bases import BASES
from backbones.layers.karat import PROJECTIONS, KArAtOperator


def operator(**options):
    torch.manual_seed(0)
    made = KArAtOperator(2, (4, 3), 1, rank=3, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():  # away from values that functions share at the start
            parameter += 0.05 * torch.rand_like(parameter)
    return made


def without(op, **options):
    rest = KArAtOperator(2, (4, 3), 1, rank=3, **options).double()
    rest.load_state_dict({name: t for name, t in op.state_dict().items() if not name.startswith("psi.")})
    return rest


@pytest.mark.parametrize("diagonal", ["shared", "positionwise"])
@pytest.mark.parametrize(
    "options", [*({"basis": b} for b in BASES), *({"order": o} for o in PROJECTIONS), {"projection": "before"}], ids=str
)
def test_adds_functions_of_single_scores_number_by_number(options, diagonal):
    op = operator(diagonal=diagonal, **options)
    rest = without(op, **options)
    q, k, v = torch.randn(3, 2, 2, 13, 4, dtype=torch.float64).unbind(0)
    mask = torch.rand(2, 13) > 0.3
    scores = q @ k.transpose(-2, -1) / 2
    weights = torch.stack(
        [
            torch.stack([op.psi.curve(scores[:, h, :, p].flatten(), h, p).view(2, 13) for p in range(13)], -1)
            for h in range(2)
        ],
        1,
    )
    expected = rest(q, k, v, (4, 3), 1, mask) + (weights * mask[:, None, None]) @ v
    poisoned = (torch.where(mask[:, None, :, None], t, torch.nan) for t in (k, v))
    torch.testing.assert_close(op(q, *poisoned, (4, 3), 1, mask), expected)


@pytest.mark.parametrize("diagonal", ["shared", "positionwise"])
@pytest.mark.parametrize("basis", ["fourier", "rational", "dog", "bspline"])
def test_gradients(basis, diagonal):
    op = operator(basis=basis, diagonal=diagonal)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 13, 3, dtype=torch.float64).unbind(0))
    names = [name for name, _ in op.named_parameters()]

    def function(*tensors):
        values = dict(zip(names, tensors[3:], strict=True))
        return torch.func.functional_call(op, values, (*tensors[:3], (4, 3), 1, None))

    torch.autograd.gradcheck(function, (q, k, v, *op.parameters()), atol=1e-5)


def test_starts_close_to_the_first_terms_of_softmax():
    s = torch.linspace(-1.5, 1.5, 31)
    for basis in ("fourier", "rational", "bspline"):
        psi = KArAtOperator(2, (4, 3), 1, rank=3, basis=basis, diagonal="shared").psi
        torch.testing.assert_close(13 * psi.curve(s, 1, 0), 1 + s, rtol=0, atol=0.15)
    for basis in BASES:  # even waves hold no slope
        psi = KArAtOperator(2, (4, 3), 1, rank=3, basis=basis, diagonal="shared").psi
        assert 13 * psi.curve(torch.zeros(1), 0, 0).item() == pytest.approx(1, abs=0.1)


def test_a_shared_function_has_2g_plus_1_numbers_per_head():
    psi = KArAtOperator(3, (8, 8), 1, harmonics=5, diagonal="shared").psi
    assert sum(p.numel() for p in psi.parameters()) == 3 * (2 * 5 + 1)
    psi = KArAtOperator(3, (8, 8), 1, harmonics=5, diagonal="positionwise").psi
    assert sum(p.numel() for p in psi.parameters()) == 3 * 65 * (2 * 5 + 1)


@pytest.mark.parametrize("diagonal", ["shared", "positionwise"])
def test_a_constant_image_gives_the_same_at_every_resolution(diagonal):
    op = operator(diagonal=diagonal)
    one = torch.randn(3, 1, 2, 1, 4, dtype=torch.float64)

    def of(rows, columns):
        q, k, v = one.expand(-1, -1, -1, rows * columns, -1).unbind(0)
        return op(q, k, v, (rows, columns), 0, None)[:, :, :1]

    torch.testing.assert_close(of(8, 6), of(4, 3))


def test_a_query_can_pick_one_key_which_the_modular_form_cannot():
    """Retrieval: each query's value stands at the one key that equals it, wherever that is."""
    torch.manual_seed(0)
    losses = {}
    for diagonal in ("none", "shared"):
        op = KArAtOperator(1, (8, 8), 0, rank=4, diagonal=diagonal)
        optimizer = torch.optim.Adam(op.parameters(), lr=0.01)
        for _ in range(200):
            k = torch.nn.functional.normalize(torch.randn(16, 1, 64, 8), dim=-1) * 3
            v = torch.randn(16, 1, 64, 8)
            place = torch.stack([torch.randperm(64) for _ in range(16)])[:, None, :, None].expand(-1, -1, -1, 8)
            loss = (op(k.gather(2, place), k, v, (8, 8), 0, None) - v.gather(2, place)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[diagonal] = loss.item()
    assert losses["shared"] < 0.5
    assert losses["none"] > 0.85


@pytest.mark.parametrize("diagonal", ["shared", "positionwise"])
def test_networks_keep_their_weights_at_another_size(diagonal, tmp_path):
    attention = {"diagonal": diagonal}
    net = create_backbone("karat_nano_patch8_64", depth=2, num_classes=0, class_token=False, attention=attention)
    save_backbone(tmp_path / "w.safetensors", net)
    larger = create_backbone(
        "karat_nano_patch8_64",
        depth=2,
        num_classes=0,
        img_size=128,
        class_token=False,
        window_size=8,
        global_blocks=(1,),
        attention=attention,
        weights=str(tmp_path / "w.safetensors"),
    )
    small, large = net.blocks[1].attn.operator, larger.blocks[1].attn.operator
    one = torch.randn(3, 1, 3, 1, 32)

    def of(operator, side):
        q, k, v = one.expand(-1, -1, -1, side**2, -1).unbind(0)
        return operator.psi(q, k, v, lambda t, *_: t, 0.1)[:, :, :1]

    torch.testing.assert_close(of(large, 16), of(small, 8))
    assert larger(torch.randn(1, 3, 96, 160)).isfinite().all()
