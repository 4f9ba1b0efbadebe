"""Named backbones: rows of numbers over BackboneConfig, and their registration with timm."""

from collections.abc import Iterable
from typing import Any

from ..config import BackboneConfig
from ..utils.errors import UserError, shown, suggest

# trunk: size: rows of numbers over BackboneConfig
SIZES = {
    "vit": {
        "nano": {"patch_size": 8, "img_size": 64, "embed_dim": 96, "depth": 6, "num_heads": 3},
        "tiny": {"patch_size": 16, "img_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 3},
        "small": {"patch_size": 16, "img_size": 224, "embed_dim": 384, "depth": 12, "num_heads": 6},
        "base": {"patch_size": 16, "img_size": 224, "embed_dim": 768, "depth": 12, "num_heads": 12},
    },
    "convit": {
        "nano": {"patch_size": 8, "img_size": 64, "embed_dim": 96, "depth": 6, "num_heads": 4, "gpsa_blocks": 4},
        "tiny": {"patch_size": 16, "img_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 4, "gpsa_blocks": 10},
    },
    "swin": {
        "nano": {"patch_size": 2, "img_size": 64, "embed_dim": 24, "num_heads": 2, "window_size": 4}
        | {"stage_depths": (2, 2, 2, 2)},
        "tiny": {"patch_size": 4, "img_size": 224, "embed_dim": 96, "num_heads": 3, "window_size": 7}
        | {"stage_depths": (2, 2, 6, 2)},
    },
}
_TRUNKS = {"vit": {}, "convit": {"qkv_bias": False}, "swin": {"class_token": False}}
# family: trunk, attention, feed-forward; gated_karat is softmax with KArAt beside it
FAMILIES = {
    "vit": ("vit", "softmax", "mlp"),
    "karat": ("vit", "karat", "mlp"),
    "kat": ("vit", "softmax", "grkan"),
    "karkat": ("vit", "karat", "grkan"),
    "gated_karat": ("vit", "gated_karat", "mlp"),
    "gated_karkat": ("vit", "gated_karat", "grkan"),
    "vitkan": ("vit", "softmax", "kan"),
    "convit": ("convit", "softmax", "mlp"),
    "karat_convit": ("convit", "karat", "mlp"),
    "gated_karat_convit": ("convit", "gated_karat", "mlp"),
    "swin": ("swin", "softmax", "mlp"),
    "karat_swin": ("swin", "karat", "mlp"),
    "gated_karat_swin": ("swin", "gated_karat", "mlp"),
}


def preset_name(family: str, size: str) -> str:
    """The preset of a family at a size: ``preset_name("karat", "nano")`` is ``karat_nano_patch8_64``."""
    _check("family", family, FAMILIES)
    sizes = SIZES[FAMILIES[family][0]]
    _check(f"size of {family}", size, sizes)
    row = sizes[size]
    window = f"_window{row['window_size']}" if "window_size" in row else ""
    return f"{family}_{size}_patch{row['patch_size']}{window}_{row['img_size']}"


def _check(what: str, value: str, table: Iterable[str]) -> None:
    if value not in table:
        raise UserError(f"unknown {what} {shown(value)}; allowed: {', '.join(table)}.{suggest(value, table)}")


def _row(family: str, size: str) -> dict[str, Any]:
    trunk, attention, ffn = FAMILIES[family]
    harmonics = 1 if (trunk, size) == ("vit", "base") else 3  # the paper's best
    mixing = {"kind": "karat", "blend": "add"} if attention == "gated_karat" else {"kind": attention}
    choices = {"attention": mixing | {"grid": harmonics}, "ffn": {"kind": ffn}}
    return SIZES[trunk][size] | _TRUNKS[trunk] | choices


_NAMES = {preset_name(family, size): (family, size) for family in FAMILIES for size in SIZES[FAMILIES[family][0]]}
PRESETS = {name: _row(*pair) for name, pair in _NAMES.items()}


def list_backbones() -> list[str]:
    """Names that ``create_backbone`` accepts."""
    return list(PRESETS)


def preset_config(arch: str) -> BackboneConfig:
    """The config of a preset; an unknown name raises UserError with the nearest valid one."""
    if not isinstance(arch, str) or arch not in PRESETS:
        raise UserError(f"unknown backbone {shown(arch)}.{suggest(str(arch), PRESETS)} Known: {', '.join(PRESETS)}.")
    return BackboneConfig(arch=arch, **PRESETS[arch])


def resize_arch(arch: str, size: str) -> str:
    """The preset of the same family at another size."""
    preset_config(arch)
    return preset_name(_NAMES[arch][0], size)
