"""What the trunks are made of: attention, operators and feed-forwards that a config asks for."""

from collections.abc import Iterator

import torch
from timm.layers import Mlp
from torch import nn

from ..config import BackboneConfig
from ..layers.attention import Attention
from ..layers.gpsa import GatedAttention
from ..layers.gr_kan import GRKAN, GroupRational
from ..layers.karat import KArAtOperator
from ..layers.operator_attention import OperatorAttention
from ..layers.pointwise import PointwiseOperator
from ..layers.spline_kan import SplineKAN


def make_operator(config: BackboneConfig, block: int, num_heads: int) -> nn.Module:
    """The operator on scores that ``attention.kind`` names for a block; not for softmax.

    Beside a softmax it draws random numbers of its own: with the same seed all else starts as in the softmax network.
    """
    if config.attention.blend == "add":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, ())))
            return _make_operator(config, block, num_heads)
    return _make_operator(config, block, num_heads)


def _make_operator(config: BackboneConfig, block: int, num_heads: int) -> nn.Module:
    attention, kind = config.attention, config.attention_kind(block)
    if kind != "karat":
        return PointwiseOperator(kind, attention.drop_rate)
    operator = KArAtOperator(
        num_heads if attention.heads is None else len(attention.heads),
        config.token_grid(block),
        int(config.class_token),
        attention.basis,
        attention.of_block("grid", block),
        attention.of_block("rank", block),
        attention.order,
        attention.base,
        attention.scales,
        attention.projection,
        attention.drop_rate,
        attention.spline_order,
        attention.init,
        attention.compiled,
        attention.diagonal,
    )
    return operator.requires_grad_(not attention.frozen)


def make_shared_operator(config: BackboneConfig) -> KArAtOperator | None:
    """Universal KArAt's one set of operators, at the grid of the first block that uses it."""
    users = [i for i in range(config.depth) if config.is_karat(i)]
    universal = config.attention.mode == "universal" and users
    return make_operator(config, users[0], config.num_heads) if universal else None


def make_attention(config: BackboneConfig, block: int) -> nn.Module:
    """The attention of a ViT's block."""
    attention, kind = config.attention, config.attention_kind(block)
    sizes, rates = (config.embed_dim, config.num_heads, config.qkv_bias), (config.drop_rate, attention.drop_rate)
    rel_pos = config.token_grid(block) if attention.rel_pos else None
    if kind == "gpsa":
        module: nn.Module = GatedAttention(*sizes, *rates)
    elif kind == "softmax":
        module = Attention(*sizes, *rates, rel_pos)
    else:
        shared = kind == "karat" and attention.mode == "universal"
        operator = None if shared else make_operator(config, block, config.num_heads)
        blend = attention.blend
        module = OperatorAttention(
            *sizes, operator, *rates, attention.heads, blend, rel_pos if blend == "add" else None
        )
    if config.freezes_scores(block):
        module.freeze_scores()
    return module


def make_feed_forward(config: BackboneConfig, dim: int) -> nn.Module:
    """The feed-forward of a block of width ``dim``."""
    ffn, hidden = config.ffn, int(dim * config.ffn.ratio)
    if ffn.kind in ("mlp", "linear"):
        return Mlp(dim, hidden, act_layer=nn.GELU if ffn.kind == "mlp" else nn.Identity, drop=config.drop_rate)
    if ffn.kind == "kan":
        return SplineKAN(dim, hidden, ffn.grid, ffn.order, config.drop_rate)
    grkan = GRKAN(dim, hidden, ffn.groups, ffn.degrees, ffn.init, ffn.weight_init, ffn.denominator, config.drop_rate)
    for rational in (grkan.act1, grkan.act2):
        rational.requires_grad_(not ffn.frozen)
    return grkan


def start_linear(network: nn.Module) -> None:
    """ViT's start of linear layers, N(0, 0.02) truncated; those of GR-KAN keep theirs."""
    own = {layer for module in network.modules() if isinstance(module, GRKAN) for layer in module.modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear) and module not in own:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def operators(network: nn.Module) -> dict[str, KArAtOperator]:
    """KArAt's operators by their name in the state dict."""
    return {name: m for name, m in network.named_modules() if isinstance(m, KArAtOperator)}


def undecayed(network: nn.Module) -> Iterator[str]:
    """Names of the parameters of the parts that no optimizer should decay: rationals, relative positions, gates."""
    for prefix, module in network.named_modules():
        if isinstance(module, GroupRational):
            yield from (f"{prefix}.weight_numerator", f"{prefix}.weight_denominator")
        if isinstance(module, Attention) and module.has_rel_pos:
            yield from (f"{prefix}.rel_pos_h", f"{prefix}.rel_pos_w")
        if getattr(module, "gate", None) is not None:
            yield f"{prefix}.gate"
