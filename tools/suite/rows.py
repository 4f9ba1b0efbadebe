"""The rows of a comparison: families, controls of a family, and the variants that a YAML file describes."""

import itertools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from backbones.config import BackboneConfig
from backbones.layer_config import AttentionConfig, FfnConfig
from backbones.models.presets import FAMILIES, preset_config, preset_name
from backbones.utils.errors import UserError, check_keys, suggest

TASKS = ("classification", "detection", "segmentation")
_SECTIONS = {"attention": AttentionConfig, "ffn": FfnConfig}
# Fields of a backbone that follow from the data, the task or the row itself.
_DERIVED = ("arch", "img_size", "in_chans", "num_classes", "final_norm", "out_indices")
_ROW_KEYS = ("family", "control", "pretraining", *TASKS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


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
    _check_unique(rows, "--backbones")
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
    return _controlled(Row(name, family), control) if control else Row(name, family)


def _controlled(row: Row, name: str) -> Row:
    control = CONTROLS[name]
    if row.family not in control.families():
        raise UserError(
            f"row {row.name!r}: the control {name!r} has no sense for {row.family!r}; "
            f"allowed: {', '.join(control.families())}."
        )
    values = row.__dict__ | {"settings": {**control.settings, **row.settings}, "control": control.part}
    return Row(**values)


def read_variants(path: str, size: str, known: Sequence[Row] = ()) -> list[Row]:
    """The rows of a variants file: names with a family, settings of the backbone and of the tasks.

    Args:
        path: YAML; see docs/comparison.md.
        size: of the comparison, which every row must have, with settings that fit it.
        known: rows that are there already, whose names a variant must not take and whose pretraining it may.

    Raises:
        UserError: naming file, row, value and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeys)  # a SafeLoader
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"--variants {path} does not exist. Give a YAML file with a family and settings per row."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--variants {path} is not valid YAML: {error}") from None
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"--variants {path} must map names of rows to their settings; it holds {_what(values)}.")
    rows: list[Row] = []
    try:
        for name, given in values.items():
            rows += _variant(name, given)
        _check_unique([*known, *rows], "rows of --backbones and variants")
        for row in rows:
            _check_pretraining(row, [*known, *rows])
            row.backbone(size)
    except UserError as error:
        raise UserError(f"--variants {path}: {error}") from None
    return rows


class _UniqueKeys(yaml.SafeLoader):
    """YAML without a key that appears twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is named twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _variant(name: Any, given: Any) -> list[Row]:
    """One row, or one for each combination of swept values."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"the row name {name!r} must be a word of letters, digits and . _ + - (it names a folder).")
    if not isinstance(given, Mapping):
        raise UserError(f"row {name!r} is {_what(given)}; it must hold keys, such as family and attention.rank.")
    flat = dict(_flat(given))
    check_keys(f"row {name!r}", flat, [*_ROW_KEYS, *_setting_names()])
    family, control = flat.get("family"), flat.get("control")
    if family not in FAMILIES:
        raise UserError(
            f"row {name!r}: family is {family!r}; allowed: {', '.join(FAMILIES)}.{suggest(family, FAMILIES)}"
        )
    if control is not None and control not in CONTROLS:
        raise UserError(
            f"row {name!r}: control is {control!r}; allowed: {', '.join(CONTROLS)}.{suggest(control, CONTROLS)}"
        )
    tasks = {task: _words(name, task, flat[task]) for task in TASKS if flat.get(task)}
    settings = {key: value for key, value in flat.items() if key not in _ROW_KEYS}
    sweeps = {key: _choices(name, key, value) for key, value in settings.items() if isinstance(value, Mapping)}
    rows = []
    for combination in itertools.product(*(choices.items() for choices in sweeps.values())):
        chosen = dict(zip(sweeps, combination, strict=True))
        row = Row(
            "-".join([name, *(label for label, _ in combination)]),
            family,
            {**settings, **{key: value for key, (_, value) in chosen.items()}},
            tasks,
            pretraining=str(flat.get("pretraining") or ""),
            variant=name,
            sweep={key: label for key, (label, _) in chosen.items()},
        )
        rows.append(row if control is None else _controlled(row, control))
    return rows


def _flat(given: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, whether the file nests the sections or not."""
    for key, value in given.items():
        if key in _SECTIONS and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items())
        else:
            yield str(key), value


def _setting_names() -> list[str]:
    names = [f.name for f in fields(BackboneConfig) if f.name not in (*_SECTIONS, *_DERIVED)]
    return names + [f"{section}.{f.name}" for section, kind in _SECTIONS.items() for f in fields(kind)]


def _choices(name: str, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Label to value of ``{sweep: ...}``: a list labels itself, a mapping names its values."""
    check_keys(f"row {name!r}: {key}", given, ["sweep"])
    values, where = given.get("sweep"), f"row {name!r}: the sweep of {key}"
    if isinstance(values, Mapping) and values:
        choices = {str(label): value for label, value in values.items()}
    elif isinstance(values, list) and values:
        choices = {_label(value): value for value in values}
    else:
        raise UserError(f"{where} is {_what(values)}; it must be a list of values, or a mapping of names to values.")
    if len(choices) < len(values):
        raise UserError(f"{where} has a value twice: {values!r}.")
    for label in choices:
        if not _NAME.fullmatch(label):
            raise UserError(f"{where} has the name {label!r}; it must be a word of letters, digits and . _ + -.")
    return choices


def _label(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).strip("_") or "empty"


def _words(name: str, task: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(word, str | int | float) for word in given):
        raise UserError(
            f"row {name!r}: {task} is {_what(given)}; it must be a list of the task's own settings, as on its command "
            "line: [train.epochs=10], or [SOLVER.EPOCHS, 5.0] for detection."
        )
    return [str(word) for word in given]


def _check_unique(rows: Sequence[Row], where: str) -> None:
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: {twice!r} is named twice; give each row once.")
    if not rows:
        raise UserError(f"{where}: there is no row. Allowed: {', '.join(FAMILIES)}, and {', '.join(CONTROLS)}.")


def _check_pretraining(row: Row, rows: Sequence[Row]) -> None:
    source = next((other for other in rows if other.name == row.pretraining), None)
    names = ", ".join(other.name for other in rows if other.pretraining == other.name)
    if source is None or source.pretraining != source.name:
        raise UserError(
            f"row {row.name!r}: pretraining is {row.pretraining!r}; it must be a row with a pretraining of its own: "
            f"{names}.{suggest(row.pretraining, names.split(', '))}"
        )


def _what(value: Any) -> str:
    """A value in a message: its type, and the value when it is short."""
    text = (
        repr(value)
        if not isinstance(value, Mapping | list)
        else f"a {'mapping' if isinstance(value, Mapping) else 'list'}"
    )
    return text if len(text) <= 60 else f"a {type(value).__name__}"
