"""Named backbones: rows of numbers over BackboneConfig, and their registration with timm."""

from typing import Any

from ..config import BackboneConfig
from ..utils.errors import UserError, suggest

# size: patch, image, width, depth, heads, KArAt's G
SIZES = {
    "nano": (8, 64, 96, 6, 3, 3),
    "tiny": (16, 224, 192, 12, 3, 3),
    "small": (16, 224, 384, 12, 6, 3),
    "base": (16, 224, 768, 12, 12, 1),
}
# family: attention, feed-forward
FAMILIES = {
    "vit": ("softmax", "mlp"),
    "karat": ("karat", "mlp"),
    "kat": ("softmax", "grkan"),
    "karkat": ("karat", "grkan"),
    "vitkan": ("softmax", "kan"),
}


def preset_name(family: str, size: str) -> str:
    """The preset of a family at a size: ``preset_name("karat", "nano")`` is ``karat_nano_patch8_64``."""
    for what, value, table in (("family", family, FAMILIES), ("size", size, SIZES)):
        if value not in table:
            raise UserError(f"unknown {what} {value!r}; allowed: {', '.join(table)}.{suggest(value, table)}")
    patch, image = SIZES[size][:2]
    return f"{family}_{size}_patch{patch}_{image}"


def _row(family: str, size: str) -> dict[str, Any]:
    patch, image, width, depth, heads, harmonics = SIZES[size]
    attention, ffn = FAMILIES[family]
    return {
        "patch_size": patch,
        "img_size": image,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "attention": {"kind": attention, "grid": harmonics},
        "ffn": {"kind": ffn},
    }


PRESETS = {preset_name(family, size): _row(family, size) for family in FAMILIES for size in SIZES}


def list_backbones() -> list[str]:
    """Names that ``create_backbone`` accepts."""
    return list(PRESETS)


def preset_config(arch: str) -> BackboneConfig:
    """The config of a preset; an unknown name raises UserError with the nearest valid one."""
    if arch not in PRESETS:
        raise UserError(f"unknown backbone {arch!r}.{suggest(arch, PRESETS)} Known: {', '.join(PRESETS)}.")
    return BackboneConfig(arch=arch, **PRESETS[arch])


def resize_arch(arch: str, size: str) -> str:
    """The preset of the same family at another size."""
    preset_config(arch)
    return preset_name(arch.split("_", maxsplit=1)[0], size)
