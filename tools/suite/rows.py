"""The rows of a comparison: families, and controls that go without a part of one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from backbones.config import BackboneConfig
from backbones.models.presets import FAMILIES, preset_config, preset_name
from backbones.utils.errors import UserError, suggest

TASKS = ("classification", "detection", "segmentation")


@dataclass(frozen=True)
class Control:
    """What is taken away from a family: ``part`` is what a column does not measure where the rest does as well.

    Args:
        part: attention or ffn.
        trunks, attentions, ffns: the families it makes sense for, by what they are made of (see FAMILIES).
        default: the family of the control's bare name.
        settings: of the backbone.
    """

    part: str
    trunks: tuple[str, ...]
    attentions: tuple[str, ...]
    ffns: tuple[str, ...]
    default: str
    settings: dict[str, Any]

    def families(self) -> list[str]:
        return [
            name
            for name, (trunk, attention, ffn) in FAMILIES.items()
            if trunk in self.trunks and attention in self.attentions and ffn in self.ffns
        ]


_TRUNKS, _ATTENTIONS, _FFNS = (tuple(dict.fromkeys(parts)) for parts in zip(*FAMILIES.values(), strict=True))
CONTROLS = {
    # ConViT's local blocks would go on mixing tokens.
    "uniform": Control("attention", ("vit", "swin"), ("softmax",), _FFNS, "vit", {"attention.kind": "uniform"}),
    # A class token would see nothing at all; the mean over tokens at the end takes its place.
    "none": Control(
        "attention", ("vit", "swin"), ("softmax",), _FFNS, "vit", {"attention.kind": "none", "class_token": False}
    ),
    "frozen": Control("attention", _TRUNKS, _ATTENTIONS, _FFNS, "karat", {"attention.frozen": True}),
    "linear": Control("ffn", _TRUNKS, _ATTENTIONS, ("mlp",), "vit", {"ffn.kind": "linear"}),
    "frozen_rational": Control("ffn", _TRUNKS, _ATTENTIONS, ("grkan",), "kat", {"ffn.frozen": True}),
}


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: also its folder's.
        family: key of FAMILIES.
        settings: of the backbone, by dotted name, in all three tasks.
        task_settings: per task, words of its own command line.
        control: part of the network that this row does without (attention, ffn); None = a row to compare.
        pretraining: row whose classifier detection and segmentation start from.
        variant: name in the variants file, which the rows of a sweep share.
        sweep: swept setting to the label of its value here.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    task_settings: dict[str, list[str]] = field(default_factory=dict)
    control: str | None = None
    pretraining: str = ""
    variant: str = ""
    sweep: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("pretraining", "variant"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def backbone(self, size: str) -> BackboneConfig:
        """The classifier's backbone; raises UserError naming the row for a value that does not fit."""
        try:
            return preset_config(preset_name(self.family, size)).merged(nested(self.settings))
        except UserError as error:
            raise UserError(f"row {self.name!r}: {error}") from None


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"attention.rank": 4}`` as ``{"attention": {"rank": 4}}``."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[key] = value
    return result


def named_rows(text: str) -> list[Row]:
    """The rows of ``vit,karat,uniform,kat.frozen_rational``: families, and controls of a family after a dot.

    A control's name alone stands for that of its usual family: ``uniform`` is ``vit.uniform``.

    Raises:
        UserError: for an unknown or repeated name, and a control that the family has no sense for.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    rows = [_named_row(name) for name in names]
    check_unique(rows, "--backbones")
    return rows


def _named_row(name: str) -> Row:
    family, dot, control = name.partition(".")
    if not dot and name in CONTROLS:
        family, control = CONTROLS[name].default, name
    if family not in FAMILIES or (dot and control not in CONTROLS):
        known = [*FAMILIES, *CONTROLS]
        raise UserError(
            f"unknown backbone {name!r}; allowed: {', '.join(FAMILIES)}, and the controls {', '.join(CONTROLS)}, of a "
            f"family as in vit.uniform.{suggest(control if family in FAMILIES else name, known)}"
        )
    return controlled(Row(name, family), control) if control else Row(name, family)


def controlled(row: Row, name: str) -> Row:
    """``row`` with the settings of the control ``name``; UserError for a family that it has no sense for."""
    control = CONTROLS[name]
    if row.family not in control.families():
        raise UserError(
            f"row {row.name!r}: the control {name!r} has no sense for {row.family!r}; "
            f"allowed: {', '.join(control.families())}."
        )
    values = row.__dict__ | {"settings": {**row.settings, **control.settings}, "control": control.part}
    return Row(**values)


def check_unique(rows: Sequence[Row], where: str) -> None:
    """Raises UserError, which names the place ``where``, for a name that two rows have and for no row at all."""
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: {twice!r} is named twice; give each row once.")
    if not rows:
        raise UserError(f"{where}: there is no row. Allowed: {', '.join(FAMILIES)}, and {', '.join(CONTROLS)}.")
