"""GR-KAN's starts: their errors and gains, the fitting script, training in bfloat16, and a ViT's or KAT's weights."""

import fit_starts
import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from backbones import create_backbone
from backbones.layers.gr_kan import GroupRational
from backbones.layers.starts import STARTS

FORMS = ("sum_abs", "abs_sum")
FUNCTIONS = {
    "identity": lambda x: x,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_start_is_its_function_within_the_stated_error(name, form):
    start = STARTS[form][name]
    x = torch.linspace(-start.limit, start.limit, 4001, dtype=torch.float64)
    layer = GroupRational(1, (5, 4), name, form).double()
    error = (layer(x[:, None])[:, 0] - FUNCTIONS[name](x)).abs().max().item()
    assert error == pytest.approx(start.error, rel=0.02, abs=5e-7)  # the coefficients are stored as float32
    assert error < {"relu": 0.021, "leaky_relu": 0.021, "gelu": 3.2e-3}.get(name, 1.2e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_the_script_finds_the_same_fit_again(name, form):
    start = STARTS[form][name]
    a, b = fit_starts.fit(name, form, start.limit)
    assert fit_starts.largest_error(name, a, b, form, start.limit) == pytest.approx(start.error, rel=0.02)


def test_a_fit_is_the_best_one_of_its_degrees():
    """Ten extremes of equal height and alternating sign would prove it; |x|'s constraint b ≥ 0 leaves fewer."""
    a, b = fit_starts.fit("gelu", "sum_abs", 3.0)
    x = np.linspace(-3, 3, 20001)
    error = fit_starts.evaluate(x, a, b, "sum_abs") - fit_starts.FUNCTIONS["gelu"](x)
    signs = np.sign(error[np.abs(error) > 0.99 * np.abs(error).max()])
    assert (np.diff(signs) != 0).sum() + 1 >= 7
    assert np.abs(error).max() < 1.3e-3


@pytest.mark.parametrize(
    ("name", "published"), [("identity", 1.0), ("gelu", 2.3568), ("swish", 2.8178), ("relu", 2.0), ("tanh", 2.5362)]
)
def test_gain_keeps_the_variance_of_a_normal_input(name, published):
    """GELU's and Swish's published gains are averages over a million samples, 0.25 % above the integrals."""
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    for form in FORMS:
        layer = GroupRational(1, (5, 4), name, form).double()
        start = STARTS[form][name]
        exact = 1 / torch.trapezoid(FUNCTIONS[name](x).square() * density, x).item()
        ours = 1 / torch.trapezoid(layer(x[:, None])[:, 0].square() * density, x).item()
        assert start.gain == pytest.approx(exact, rel=1e-6)
        assert start.gain == pytest.approx(published, rel=3e-3)
        assert ours == pytest.approx(exact, rel=0.03 if name == "relu" else 5e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_higher_degrees_start_as_the_same_function(name, form):
    x = torch.randn(50, 8)
    low, high = (GroupRational(4, degrees, name, form)(x) for degrees in ((5, 4), (7, 6)))
    torch.testing.assert_close(low, high)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "identity"])
def test_lower_degrees_start_as_the_identity_only(name):
    with pytest.raises(ValueError, match=rf"ffn.init '{name}' needs ffn.degrees of at least \(5, 4\), got \(3, 2\)"):
        create_backbone("kat_nano_patch8_64", ffn={"degrees": (3, 2), "init": name})
    create_backbone("kat_nano_patch8_64", depth=1, ffn={"degrees": (3, 2), "init": "identity"})
    with pytest.raises(ValueError, match=r"'selu'.*'leaky_relu'"):
        create_backbone("kat_nano_patch8_64", ffn={"init": "selu"})


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_start_trains_in_bfloat16(name, form):
    net = create_backbone(
        "kat_nano_patch8_64", num_classes=4, img_size=16, depth=2, embed_dim=48, ffn={"init": name, "denominator": form}
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 16, 16) * 0.5 + labels.view(-1, 1, 1, 1)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert min(losses[-3:]) < 0.7 * losses[0]


@pytest.fixture
def vit(tmp_path):
    """A ViT with random weights that give pre-activations a standard deviation near 1, and its file."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.startswith("blocks") and parameter.dim() > 1:
                parameter.mul_(3.6)
        source.head.weight.normal_(std=0.1)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    return source, str(tmp_path / "vit.pth")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["swish", "identity"])
def test_a_vit_keeps_its_function_as_kat(vit, form, init, capsys):
    source, path = vit
    net = create_backbone(
        "kat_tiny_patch16_224", num_classes=10, weights=path, ffn={"init": init, "denominator": form}
    ).eval()
    report = capsys.readouterr().out
    assert "100.0% of" in report
    assert "missing   0" in report
    assert "started   48: F1 = identity, F2 = GELU, the activation of" in report
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = source(x)
        assert (net(x) - expected).norm() < 0.01 * expected.norm()
        assert all(torch.equal(p, net.state_dict()[name]) for name, p in source.state_dict().items())


def test_a_vit_of_this_project_keeps_its_function_as_kat(tmp_path):
    source = create_backbone("vit_nano_patch8_64", num_classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    net = create_backbone("kat_nano_patch8_64", num_classes=5, weights=str(tmp_path / "vit.pth"))
    x = torch.randn(2, 3, 64, 64)
    assert (net(x) - source(x)).norm() < 0.05 * source(x).norm()


def test_degrees_too_low_for_gelu_keep_their_start_and_count_as_missing(tmp_path, capsys):
    torch.save(create_backbone("vit_nano_patch8_64").state_dict(), tmp_path / "vit.pth")
    create_backbone(
        "kat_nano_patch8_64", weights=str(tmp_path / "vit.pth"), ffn={"degrees": (3, 2), "init": "identity"}
    )
    assert "missing   24: blocks.0.mlp.act1.weight_numerator" in capsys.readouterr().out


def test_kats_own_coefficients_are_not_replaced(tmp_path):
    source = create_backbone("kat_nano_patch8_64", ffn={"init": "tanh"})
    torch.save(source.state_dict(), tmp_path / "kat.pth")
    net = create_backbone("kat_nano_patch8_64", weights=str(tmp_path / "kat.pth"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])


def released_state(depth, dim=192, classes=10):
    """Random tensors by the names and shapes of the published KAT-Tiny files, with coefficients far from a start."""
    width = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    state = {
        "cls_token": torch.randn(1, 1, dim),
        "pos_embed": torch.randn(1, 197, dim),
        "patch_embed.proj.weight": torch.randn(dim, 3, 16, 16) * 0.05,
        "patch_embed.proj.bias": torch.randn(dim),
        "head.weight": torch.randn(classes, dim) * 0.1,
        "head.bias": torch.randn(classes),
    }
    norms = ["norm"]
    for i in range(depth):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        for name, shape in width.items():
            state[f"blocks.{i}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            state[f"blocks.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.1
        for act in ("act1", "act2"):
            state[f"blocks.{i}.mlp.{act}.weight_numerator"] = torch.randn(1, 6) * 0.5
            state[f"blocks.{i}.mlp.{act}.weight_denominator"] = torch.randn(8, 4) * 0.5
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + 0.1 * torch.randn(dim), 0.1 * torch.randn(dim)
    return state


def released_logits(state, x, depth, heads=3, groups=8):
    """The published KAT's formula on a state dict, without our modules."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def rational(x, name):
        a, b = state[f"{name}.weight_numerator"], state[f"{name}.weight_denominator"].abs()
        b = b.repeat_interleave(x.shape[-1] // groups, 0)  # (C, 4)
        return sum(a[0, i] * x**i for i in range(6)) / (1 + sum(b[:, j] * x.abs() ** (j + 1) for j in range(4)))

    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), patches.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]
    batch, tokens, dim = x.shape
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(batch, tokens, dim), f"{block}.attn.proj")
        hidden = linear(rational(norm(x, f"{block}.norm2"), f"{block}.mlp.act1"), f"{block}.mlp.fc1")
        x = x + linear(rational(hidden, f"{block}.mlp.act2"), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def test_published_kat_checkpoints_give_the_published_models_logits(tmp_path, capsys):
    state = released_state(depth=12)
    torch.save({"state_dict": state, "epoch": 300, "arch": "kat_tiny_patch16_224"}, tmp_path / "kat.pth.tar")
    net = create_backbone("kat_tiny_patch16_224", num_classes=10, weights=str(tmp_path / "kat.pth.tar")).eval()
    report = capsys.readouterr().out
    assert "matched   200 tensors" in report
    assert "started" not in report
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = released_logits(state, x, depth=12)
        assert expected.std() > 0.5
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
