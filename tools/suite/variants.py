"""More rows from a YAML file: a family, settings of the backbone and of the tasks, and sweeps of them."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from backbones.config import BackboneConfig
from backbones.layer_config import AttentionConfig, FfnConfig
from backbones.models.presets import FAMILIES
from backbones.utils.documents import read_yaml
from backbones.utils.errors import UserError, check_keys, suggest

from .rows import CONTROLS, TASKS, Row, check_unique, controlled

_SECTIONS = {"attention": AttentionConfig, "ffn": FfnConfig}
# Fields of a backbone that follow from the data, the task or the row itself.
_DERIVED = ("arch", "img_size", "in_chans", "num_classes", "final_norm", "out_indices")
_ROW_KEYS = ("family", "control", "pretraining", *TASKS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What a comparison writes beside the folders of its rows.
_TAKEN = ("data", "pictures", "report.html", "results.json", "speed.json", "suite.json", "table.md")


def read_variants(path: str, size: str, known: Sequence[Row] = ()) -> list[Row]:
    """The rows of a variants file: names with a family, settings of the backbone and of the tasks.

    Args:
        path: YAML; see docs/comparison.md.
        size: of the comparison, which every row must have, with settings that fit it.
        known: rows that are there already, whose names a variant must not take and whose pretraining it may.

    Raises:
        UserError: naming file, row, value and what is allowed.
    """
    values = read_yaml(path, "--variants")
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"--variants {path} must map names of rows to their settings; it holds {_what(values)}.")
    rows: list[Row] = []
    try:
        for name, given in values.items():
            rows += _variant(name, given)
        check_unique([*known, *rows], "rows of --backbones and variants")
        for row in rows:
            _check_pretraining(row, [*known, *rows])
            row.backbone(size)
    except UserError as error:
        raise UserError(f"--variants {path}: {error}") from None
    return rows


def _variant(name: Any, given: Any) -> list[Row]:
    """One row, or one for each combination of swept values."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"the row name {name!r} must be a word of letters, digits and . _ + - (it names a folder).")
    if name in _TAKEN:
        raise UserError(f"the row name {name!r} is that of the comparison's own {name}. Give the row another name.")
    if not isinstance(given, Mapping):
        raise UserError(f"row {name!r} is {_what(given)}; it must hold keys, such as family and attention.rank.")
    flat = dict(_flat(given))
    check_keys(f"row {name!r}", flat, [*_ROW_KEYS, *_setting_names()])
    family, control = flat.get("family"), flat.get("control")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"row {name!r}: family is {family!r}; allowed: {', '.join(FAMILIES)}.{suggest(family, FAMILIES)}"
        )
    if control is not None and (not isinstance(control, str) or control not in CONTROLS):
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
        rows.append(row if control is None else controlled(row, control))
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
