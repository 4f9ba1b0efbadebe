"""Which keys a detection run has: Detectron2's, those of the backbone, and schedules in epochs.

A value of None means: derived from the others in ``resolve`` (or, under MODEL.VIT, the preset's).
"""

import ast
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from fvcore.common.config import BASE_KEY

from backbones.config import BackboneConfig
from backbones.layer_config import AttentionConfig, FfnConfig
from backbones.models.presets import SIZES, preset_config, resize_arch
from backbones.training.groups import check_operator_lr
from backbones.training.images import MAX_PIXELS
from backbones.utils.documents import MAX_DEPTH, check_plain, read_yaml
from backbones.utils.errors import UserError, check_choice, check_keys, shown, suggest
from backbones.utils.values import finite

from .backbone import backbone_config, pyramid_strides
from .limits import check_limits, check_lists

SIZES_FOLDER = Path(__file__).parent / "sizes"
_MAX_BASES = 16
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")

# Detectron2's keys that nothing here reads, and what to use instead.
_REMOVED = {
    "DATASETS.TRAIN": "DATASETS.TRAIN_JSON and DATASETS.TRAIN_IMAGES",
    "DATASETS.TEST": "DATASETS.TEST_JSON and DATASETS.TEST_IMAGES",
    "SOLVER.BASE_LR": "SOLVER.REFERENCE_LR, the learning rate at SOLVER.REFERENCE_BATCH images",
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.STEPS": "SOLVER.STEP_FRACTIONS",
    "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "SOLVER.CLIP_GRADIENTS": "SOLVER.CLIP_NORM",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
    "INPUT.CROP": "INPUT.LSJ",
    "INPUT.MIN_SIZE_TRAIN": "INPUT.IMAGE_SIZE and INPUT.LSJ",
    "INPUT.MAX_SIZE_TRAIN": "INPUT.IMAGE_SIZE and INPUT.LSJ",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "INPUT.LSJ",
    "MODEL.FPN": "MODEL.SFP",
}


def _backbone_keys(kind: type) -> CfgNode:
    nested = {"attention": AttentionConfig, "ffn": FfnConfig}
    return CfgNode({f.name: _backbone_keys(nested[f.name]) if f.name in nested else None for f in fields(kind)})


def get_config() -> CfgNode:
    """Every key with its default: ViTDet's Mask R-CNN recipe for COCO."""
    assert is_dataclass(BackboneConfig)
    cfg = get_cfg()
    for path in _REMOVED:
        section, key = path.split(".")
        del cfg[section][key]

    cfg.MODEL.VIT = _backbone_keys(BackboneConfig)
    cfg.MODEL.SFP = CfgNode({"OUT_CHANNELS": 256, "NORM": "LN"})
    cfg.MODEL.SFP.SCALE_FACTORS = None  # levels made of a ViT's one map: [4.0, 2.0, 1.0, 0.5]; a Swin has its own
    cfg.MODEL.SFP.SQUARE_PAD = None  # side that images are padded to: IMAGE_SIZE; 0 = only to whole patches
    cfg.MODEL.DEVICE = None  # the GPU if there is one
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MODEL.BACKBONE.NAME = "build_karvis_vitdet_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = None  # read from the JSON
    cfg.MODEL.ROI_HEADS.IN_FEATURES = None  # every level but the top one
    cfg.MODEL.RPN.IN_FEATURES = None  # every level
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = None  # 8 × stride per level

    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS  # larger images are not decoded
    cfg.INPUT.IMAGE_SIZE = 1024  # longest side, pixels
    cfg.INPUT.MIN_SIZE_TEST = None  # IMAGE_SIZE
    cfg.INPUT.MAX_SIZE_TEST = None  # IMAGE_SIZE
    cfg.INPUT.LSJ = CfgNode({"MIN_SCALE": 0.1, "MAX_SCALE": 2.0})
    cfg.INPUT.MASK_FORMAT = None  # polygon, or bitmask when the JSON has RLE masks

    for key in ("TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES"):
        cfg.DATASETS[key] = ""

    solver = cfg.SOLVER
    solver.EPOCHS = 100.0
    solver.IMS_PER_BATCH = 64
    solver.REFERENCE_LR = 1e-4
    solver.REFERENCE_BATCH = 64
    solver.WARMUP_EPOCHS = 0.135
    solver.STEP_FRACTIONS = (0.889, 0.963)
    solver.WEIGHT_DECAY = 0.1
    solver.LAYER_DECAY = 0.7
    solver.OPERATOR_LR = "derived"
    solver.CLIP_NORM = 1.0
    solver.AMP.ENABLED = True  # bf16, on GPUs that have it
    solver.CHECKPOINT_EPOCHS = 1.0
    solver.CHECKPOINT_MINUTES = 30.0  # also save when this long has passed; 0 = not for the time
    solver.CHECKPOINT_STEPS = 0  # also save every so many steps; 0 = not for the count
    solver.KEEP_EPOCHS = 0.0  # keep a checkpoint of every so many epochs beside the last; 0 = the last alone
    solver.LOG_STEPS = 20
    solver.LOG_OPERATORS = True  # scores, outputs and steps of KArAt's operators, and gradients by part
    cfg.TEST.EVAL_EPOCHS = 0.0  # 0 = after the last epoch only
    cfg.SEED = 0
    cfg.OUTPUT_DIR = "runs/detection"
    return cfg


def load_config(path: str | Path | None, size: str | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """Reads a YAML file (with its ``_BASE_``), an overlay of ``detection/sizes/`` and KEY VALUE pairs, in this order.

    The overlay of a Swin Transformer is ``SIZE_swin.yaml`` where there is one.

    Raises:
        UserError: for a missing file, a size that the family lacks, an unknown key (naming the nearest valid one), or a
            value of the wrong type.
    """
    cfg = get_config()
    if path is not None:
        merge(cfg, _read_yaml(Path(path)), f"{path}")
    if size is not None:
        check_choice("--size", size, SIZES["vit"])
        overlay = SIZES_FOLDER / f"{size}.yaml"
        if cfg.MODEL.VIT.arch is not None:
            cfg.MODEL.VIT.arch = resize_arch(cfg.MODEL.VIT.arch, size)
            own = overlay.with_stem(f"{size}_swin")
            if preset_config(cfg.MODEL.VIT.arch).stage_depths is not None and own.is_file():
                overlay = own
        merge(cfg, _read_yaml(overlay), f"size {size}")
    if len(overrides) % 2:
        raise UserError(f"settings come as KEY VALUE pairs; {overrides[-1]!r} has no value.")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        nested: Any = _literal(value)
        if key.count(".") > MAX_DEPTH:
            raise UserError(f"{shown(key)} has {key.count('.') + 1} parts; a setting has a few, such as SOLVER.EPOCHS.")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(cfg, nested, "the command line")
    return resolve(cfg)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file on top of those of its ``_BASE_``; ``above`` are the files that build on it."""
    if not path.exists():
        if above:
            raise UserError(f"config {above[-1]} builds on {path}, which does not exist.")
        known = [p.name for p in Path(__file__).parent.glob("[a-z]*.yaml")]
        raise UserError(f"config {path} does not exist.{suggest(path.name, known)} Check the path.")
    if len(above) > _MAX_BASES or path.resolve() in [p.resolve() for p in above]:
        raise UserError(f"config {above[0]} builds on itself, or on more than {_MAX_BASES} others. Shorten the chain.")
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds no keys.")
    base = values.pop(BASE_KEY, None)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f"config {path} builds on {shown(base)}; {BASE_KEY} must be the path of one file.")
    return _merged(_read_yaml(path.parent / Path(base).expanduser(), (*above, path)), values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _literal(text: Any) -> Any:
    try:
        value = ast.literal_eval(text)
        check_plain(value, "a setting")
        return value
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def merge(cfg: CfgNode, values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Puts ``values`` into ``cfg``; each key must exist and each value have the type of what it replaces."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in _REMOVED:
            raise UserError(f"{source}: {path} is not used here. Set {_REMOVED[path]}.")
        check_keys(f"{source}: {prefix.rstrip('.') or 'the config'}", [key], cfg)
        current = cfg[key]
        if isinstance(current, CfgNode):
            if not isinstance(value, dict):
                raise UserError(
                    f"{source}: {path} is {shown(value)}; it is a section with the keys {', '.join(current)}."
                )
            merge(current, value, source, f"{path}.")
        else:
            cfg[key] = _coerced(value, current, f"{source}: {path}")


def _coerced(value: Any, current: Any, where: str) -> Any:
    if isinstance(value, dict):
        raise UserError(f"{where} is a single value, not a section.")
    if value is None or current is None or type(value) is type(current):
        return value
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(current, float) and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return finite(value)
        except ValueError:
            pass
    if isinstance(current, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(current, list | tuple) and isinstance(value, list | tuple):
        return type(current)(value)
    raise UserError(f"{where} is {shown(value)}; it must be a {type(current).__name__}, such as {current!r}.")


def resolve(cfg: CfgNode) -> CfgNode:
    """Fills in the values that are None because they follow from others, and checks those that must fit together."""
    check_limits(cfg)
    check_lists(cfg)
    _check_ranges(cfg)
    size, sfp = cfg.INPUT.IMAGE_SIZE, cfg.MODEL.SFP
    backbone = backbone_config(cfg)

    def default(node: CfgNode, key: str, value: Any) -> None:
        if node[key] is None:
            node[key] = value

    if backbone.stage_depths is None:
        default(sfp, "SCALE_FACTORS", [4.0, 2.0, 1.0, 0.5])
    patch, levels = backbone.patch_size, pyramid_strides(backbone, sfp.SCALE_FACTORS)
    names, strides = list(levels), list(levels.values())
    default(cfg.MODEL, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    default(sfp, "SQUARE_PAD", size)
    default(cfg.INPUT, "MIN_SIZE_TEST", size)
    default(cfg.INPUT, "MAX_SIZE_TEST", size)
    default(cfg.MODEL.RPN, "IN_FEATURES", names)
    default(cfg.MODEL.ROI_HEADS, "IN_FEATURES", names[:-1])
    default(cfg.MODEL.ANCHOR_GENERATOR, "SIZES", [[8 * stride] for stride in strides])

    multiple = max(strides[-2], patch)
    if sfp.SQUARE_PAD % multiple:
        near = max(multiple, round(sfp.SQUARE_PAD / multiple) * multiple)
        raise UserError(
            f"images are padded to {sfp.SQUARE_PAD} pixels, which patches of {patch} and a pyramid down to stride "
            f"{strides[-2]} do not divide. Set INPUT.IMAGE_SIZE to a multiple of {multiple}, such as {near}."
        )
    if sfp.SQUARE_PAD and max(cfg.INPUT.MAX_SIZE_TEST, size) > sfp.SQUARE_PAD:
        raise UserError(
            f"images of up to {max(cfg.INPUT.MAX_SIZE_TEST, size)} pixels would be cut to MODEL.SFP.SQUARE_PAD "
            f"{sfp.SQUARE_PAD}. Raise it, or set it to 0 to pad to whole patches only."
        )
    for key in ("RPN", "ROI_HEADS"):
        check_keys(f"MODEL.{key}.IN_FEATURES", cfg.MODEL[key].IN_FEATURES, names)
    anchors = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    if len(anchors) not in (1, len(cfg.MODEL.RPN.IN_FEATURES)):
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.SIZES has {len(anchors)} levels; MODEL.RPN.IN_FEATURES has "
            f"{len(cfg.MODEL.RPN.IN_FEATURES)}: {', '.join(cfg.MODEL.RPN.IN_FEATURES)}. Give one list per level."
        )
    return cfg


def _check_ranges(cfg: CfgNode) -> None:
    check_choice("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, SCHEDULES)
    check_choice("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, (None, "polygon", "bitmask"))
    check_choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("horizontal", "vertical", "none"))
    factors = cfg.MODEL.SFP.SCALE_FACTORS
    if factors is not None and not (isinstance(factors, list | tuple) and factors):
        raise UserError(
            f"MODEL.SFP.SCALE_FACTORS is {shown(factors)}; it must be a list, such as [4.0, 2.0, 1.0, 0.5]."
        )
    for scale in factors or ():
        check_choice("a value of MODEL.SFP.SCALE_FACTORS", scale, (4.0, 2.0, 1.0, 0.5))
    positive = ("EPOCHS", "IMS_PER_BATCH", "REFERENCE_LR", "REFERENCE_BATCH", "CHECKPOINT_EPOCHS", "LOG_STEPS")
    for key in positive:
        if cfg.SOLVER[key] <= 0:
            raise UserError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be more than 0.")
    for key in ("CHECKPOINT_MINUTES", "CHECKPOINT_STEPS", "KEEP_EPOCHS"):
        if cfg.SOLVER[key] < 0:
            raise UserError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be 0 or more.")
    check_operator_lr(cfg.SOLVER.OPERATOR_LR, "SOLVER.OPERATOR_LR")
    if not isinstance(cfg.INPUT.IMAGE_SIZE, int) or cfg.INPUT.IMAGE_SIZE <= 0:
        raise UserError(f"INPUT.IMAGE_SIZE is {cfg.INPUT.IMAGE_SIZE}; it must be a number of pixels, such as 1024.")
    if not 0 < cfg.INPUT.LSJ.MIN_SCALE <= cfg.INPUT.LSJ.MAX_SCALE:
        raise UserError(f"INPUT.LSJ is {dict(cfg.INPUT.LSJ)}; 0 < MIN_SCALE <= MAX_SCALE must hold.")
    if cfg.MODEL.DEVICE not in (None, "cpu") and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} and no GPU is visible. Set MODEL.DEVICE cpu.")
