"""A recipe: model, data, augmentation and schedule of one classification run, from YAML and key=value overrides."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from backbones.training.groups import check_operator_lr
from backbones.training.images import MAX_PIXELS
from backbones.utils.documents import MAX_DEPTH, parse_yaml, read_yaml
from backbones.utils.errors import UserError, check_choice, check_keys, shown
from backbones.utils.values import finite

_LARGEST = 10**9
_RANGES = {  # of settings that have no check of their own
    **dict.fromkeys(("augment.erasing", "augment.smoothing"), (0, 1)),
    **dict.fromkeys(("augment.mixup", "augment.cutmix", "augment.color_jitter"), (0, 1000)),
    **dict.fromkeys(("augment.scale", "augment.ratio", "data.std"), (1e-6, 1e6)),
    "data.workers": (0, 1024),
    "data.max_pixels": (1, 2**40),
    "train.batch_size": (1, 2**20),
    "train.epochs": (1, 10**6),
    "train.betas": (0, 1 - 1e-9),
    "train.seed": (0, 2**63 - 1),
}


@dataclass
class Data:
    """Where images come from. ``root`` holds train/ and val/ (or validation, valid, test) as class folders or as .tar
    files of them, or the published CIFAR-10/100 batches."""

    root: str = ""
    train: str = ""  # name of the training split under root; "" = found
    val: str = ""
    workers: int = 2
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    max_pixels: int = MAX_PIXELS  # larger images are not decoded


@dataclass
class Augment:
    """timm's augmentations; 0 or "" turns one off."""

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str = ""
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1


@dataclass
class Train:
    """Schedule and optimizer. ``lr``, ``warmup_lr`` and ``min_lr`` hold at ``reference_batch``; they are scaled to the
    batch at hand."""

    epochs: int = 100
    batch_size: int = 128  # per process
    reference_batch: int = 512
    optimizer: str = "adamw"
    lr: float = 5e-4
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    warmup_epochs: float = 5.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    operator_lr: str = "derived"  # of KArAt's tensors; or a factor of lr, 1.0 as in the paper
    clip_grad: float = 0.0
    ema_decay: float = 0.0
    precision: str = "auto"  # bf16 on GPUs that have it, else fp32
    eval_every: int = 1  # epochs
    save_minutes: float = 30.0  # also save when this long has passed; 0 = at the end of each epoch only
    save_steps: int = 0  # also save every so many steps; 0 = not for the count
    keep_every: int = 0  # keep the checkpoint of every k-th epoch beside the last; 0 = the last alone
    log_every: int = 20  # steps
    log_operators: bool = True  # scores, outputs and steps of KArAt's operators, and gradients by part
    seed: int = 0


@dataclass
class Recipe:
    """One run; ``model`` holds fields of BackboneConfig with ``arch``."""

    model: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    train: Train = field(default_factory=Train)
    output: str = "runs/classification"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raises UserError for the first value out of range."""
        if not self.data.root:
            raise UserError("data.root is missing. Give the folder of the images: data.root=PATH")
        if "arch" not in self.model:
            raise UserError("model.arch is missing. Give a backbone: model.arch=karat_nano_patch8_64")
        check_choice("train.precision", self.train.precision, ("auto", "fp32", "bf16"))
        check_choice("data.interpolation", self.data.interpolation, ("bilinear", "bicubic", "random"))
        for name in ("epochs", "batch_size", "reference_batch", "eval_every", "log_every"):
            if getattr(self.train, name) < 1:
                raise UserError(f"train.{name} is {getattr(self.train, name)}; it must be at least 1.")
        check_operator_lr(self.train.operator_lr, "train.operator_lr")
        positive, kept = ("lr", "eps"), ("save_minutes", "save_steps", "keep_every")
        for name in ("warmup_lr", "min_lr", "warmup_epochs", "weight_decay", "clip_grad", *kept, *positive):
            value = getattr(self.train, name)
            if value < 0 or (name in positive and value == 0):
                raise UserError(
                    f"train.{name} is {value}; it must be {'positive' if name in positive else '0 or more'}."
                )
        for owner, name in (
            ("train", "ema_decay"),
            ("train", "layer_decay"),
            ("data", "crop_pct"),
            ("augment", "hflip"),
        ):
            value = getattr(getattr(self, owner), name)
            if not 0 <= value <= 1:
                raise UserError(f"{owner}.{name} is {value}; it must be between 0 and 1.")
        if self.train.warmup_epochs >= self.train.epochs and self.train.epochs > 1:
            raise UserError(
                f"train.warmup_epochs {self.train.warmup_epochs} does not end within train.epochs {self.train.epochs}."
            )
        for where, section in (("data", self.data), ("augment", self.augment), ("train", self.train)):
            for item in fields(section):
                _check_bounds(f"{where}.{item.name}", getattr(section, item.name), getattr(type(section)(), item.name))


def _check_bounds(name: str, value: Any, default: Any) -> None:
    """Raises UserError for a number outside its range, and a list of another length than its default."""
    if isinstance(default, list) and len(value) != len(default):
        raise UserError(f"{name} has {len(value)} values; it must have {len(default)}, such as {default}.")
    low, high = _RANGES.get(name, (-_LARGEST, _LARGEST))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not low <= number <= high:
            raise UserError(f"{name} is {shown(value)}; it must be between {low} and {high}.")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies ``key=value`` overrides such as ``train.epochs=10``.

    Raises:
        UserError: for a missing or broken file, an unknown key (naming the nearest valid one), a value of another type.
    """
    if not Path(path).exists():
        shipped = ", ".join(sorted(p.name for p in (Path(__file__).parent / "recipes").glob("*.yaml")))
        raise UserError(f"no recipe {path}. Shipped in classification/recipes: {shipped}.")
    values = read_yaml(path, "the recipe") or {}
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must hold keys and values; it holds {type(values).__name__}.")
    recipe = _fill(Recipe(), values, "")
    for override in overrides:
        _apply(recipe, override)
    recipe.check()
    return recipe


def _apply(recipe: Recipe, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{shown(override)} is not key=value, such as data.root=PATH or train.epochs=10.")
    path = key.split(".")
    if len(path) > MAX_DEPTH:
        raise UserError(f"{shown(key)} has {len(path)} parts; a setting has a few, such as train.epochs.")
    try:
        value = parse_yaml(text, shown(key))
    except UserError:
        value = text  # such as a path with a colon
    for part in reversed(path):
        value = {part: value}
    _fill(recipe, value, "")


def _fill(target: Any, values: Mapping[str, Any], where: str) -> Any:
    check_keys(
        f"the recipe's {where.rstrip('.')!r}" if where else "the recipe", values, [f.name for f in fields(target)]
    )
    types = get_type_hints(type(target))
    for key, value in values.items():
        current = getattr(target, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}{key} is {shown(value)}; it holds keys, such as {fields(current)[0].name}.")
            _fill(current, value, f"{where}{key}.")
        elif isinstance(current, dict):
            _merge(current, value, where + key)
        else:
            setattr(target, key, _cast(value, types[key], where + key))
    return target


def _merge(current: dict[str, Any], value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {shown(value)}; it holds keys, such as arch.")
    for key, inner in value.items():
        if isinstance(inner, Mapping) and isinstance(current.get(key), dict):
            _merge(current[key], inner, f"{where}.{key}")
        else:
            current[key] = inner


def _cast(value: Any, kind: Any, where: str) -> Any:
    """``value`` as ``kind``; YAML reads 1e-3 as text, and a number may stand for text (a folder called 2024)."""
    try:
        if kind is float and not isinstance(value, bool):
            return finite(value)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool | float):
            return int(value)
        if kind is str and isinstance(value, str | int | float | type(None)) and "\0" not in str(value):
            return "" if value is None else str(value)
        if kind == list[float] and isinstance(value, Sequence) and not isinstance(value, str):
            return [finite(v) for v in value]
    except (TypeError, ValueError, OverflowError):
        pass
    expected = getattr(kind, "__name__", str(kind)) if kind != list[float] else "list of numbers"
    raise UserError(f"{where} is {shown(value)}; it must be a {expected}.")
