"""Loads a segmentation config and fills in what follows from other settings: folders, sizes, classes, iterations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules

from backbones.config import BackboneConfig
from backbones.models.presets import SIZES, preset_config, resize_arch
from backbones.training.groups import DERIVED, check_operator_lr
from backbones.training.images import MAX_PIXELS
from backbones.utils.errors import UserError, check_choice, check_keys

from .datasets import class_metainfo, class_weights
from .limits import check_limits

CONFIG_FOLDER = Path(__file__).parent / "configs"


def load_config(
    path: str | Path,
    size: str | None = None,
    options: Mapping[str, Any] | None = None,
    work_dir: str | Path | None = None,
) -> Config:
    """Reads a config, applies the overlay of ``size`` and then ``options``, and derives the rest.

    Args:
        path: an mmengine config file.
        size: nano, tiny, small or base; None leaves the config as it is.
        options: ``{"a.b.c": value}``, as of ``--cfg-options``.
        work_dir: output folder; by default ``runs/seg_<config>_<size>``.

    Raises:
        UserError: missing or broken config, unknown size, unknown key in ``options``, values that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in CONFIG_FOLDER.glob("upernet_*.py")))
        raise UserError(f"the config {path} does not exist. In segmentation/configs there are {known}.")
    if path.suffix != ".py":  # of YAML, mmengine makes objects of any class
        raise UserError(
            f"the config {path} is no Python file. Write it as those in segmentation/configs, ending in .py."
        )
    try:
        cfg = Config.fromfile(path)
    except UserError:
        raise
    except Exception as error:  # a config is a program, which fails in any way
        raise UserError(f"the config {path} cannot be read: {type(error).__name__}: {error}") from error
    if size is not None:
        check_choice("size", size, SIZES["vit"])
        cfg.merge_from_dict(Config.fromfile(CONFIG_FOLDER / "sizes" / f"{size}.py").to_dict())
        cfg.model.backbone.arch = resize_arch(cfg.model.backbone.arch, size)
    check_options(cfg, options or {})
    cfg.merge_from_dict(dict(options or {}))
    if work_dir is not None or cfg.get("work_dir") is None:
        cfg.work_dir = str(work_dir or Path("runs") / f"seg_{path.stem}{f'_{size}' if size else ''}")
    register_all_modules(init_default_scope=True)
    check_limits(cfg)
    derive(cfg)
    return cfg


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuses a key whose parent is not in the config, which mmengine would add without a word.

    The last part may be new: constructors have arguments that the config leaves at their defaults, and refuse others.
    """
    for key in options:
        *parents, last = key.split(".")
        node: Any = cfg
        for depth, part in enumerate(parents):
            node = node[int(part)] if isinstance(node, list) and part.isdigit() and int(part) < len(node) else node
            if isinstance(node, Config | ConfigDict):
                check_keys(".".join(parents[:depth]) or "the config", [part], list(node.keys()))
                node = node[part]
        if not parents or parents == ["schedule"]:
            check_keys("the config" if not parents else "schedule", [last], [*node.keys(), "work_dir"])


def derive(cfg: Config) -> None:
    """Fills in everything that follows from ``data_root``, ``crop_size`` and ``model.backbone``.

    A Swin Transformer's stages are a pyramid already, so the head sits on them without ``model.neck``.
    """
    backbone = backbone_config(cfg)
    crop = (cfg.crop_size, cfg.crop_size)
    classes = class_metainfo(cfg.data_root)["classes"]

    model = cfg.model
    model.backbone.img_size = list(backbone.img_size)
    model.backbone.out_indices = list(backbone.out_indices)
    if backbone.stage_depths is None:
        model.neck.embed_dim = backbone.embed_dim
    else:
        model.neck = None
    widths = list(backbone.widths)
    model.decode_head.update(in_channels=widths, num_classes=len(classes))
    model.auxiliary_head.update(in_channels=widths[model.auxiliary_head.in_index], num_classes=len(classes))
    # At test time mmseg pads to whole patches and cuts the padding off the prediction.
    model.data_preprocessor.update(size=crop, test_cfg={"size_divisor": backbone.patch_size})
    if model.test_cfg.mode == "slide":
        # Two thirds of a crop from one to the next, as in mmseg's ADE20K configs.
        model.test_cfg.setdefault("crop_size", crop)
        model.test_cfg.setdefault("stride", (cfg.crop_size * 2 // 3,) * 2)

    paramwise = cfg.optim_wrapper.get("paramwise_cfg") or {}
    check_operator_lr(paramwise.get("operator_lr", DERIVED), "optim_wrapper.paramwise_cfg.operator_lr")
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = cfg.data_root
        loader.dataset.seed = cfg.randomness.seed
        loader.persistent_workers = loader.persistent_workers and loader.num_workers > 0
        for step in loader.dataset.pipeline:
            if step.type in ("LoadCheckedImage", "LoadCheckedAnnotations"):
                step.setdefault("max_pixels", cfg.get("max_pixels", MAX_PIXELS))
            if step.type in ("RandomResize", "Resize"):
                step.setdefault("scale", (4 * cfg.crop_size, cfg.crop_size))
            if step.type == "RandomCrop":
                step.setdefault("crop_size", crop)
    cfg.test_pipeline = [step for step in cfg.val_dataloader.dataset.pipeline if step.type != "LoadCheckedAnnotations"]
    for hook in cfg.custom_hooks:
        if hook.type == "MetricsHook":
            hook.setdefault("interval", cfg.log_interval)


def backbone_config(cfg: Config) -> BackboneConfig:
    """The backbone's config at the crop size; four evenly spaced blocks, or a Swin Transformer's stages, give the maps
    unless others are named.
    """
    overrides = {key: value for key, value in cfg.model.backbone.items() if key not in ("type", "arch", "init_cfg")}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    overrides = {"img_size": cfg.crop_size, **overrides, "num_classes": 0, "final_norm": False}
    config = preset_config(cfg.model.backbone.arch).merged(overrides)
    if config.stage_depths is None:
        name, levels = "model.neck.rescales", len(cfg.model.neck.rescales)
    else:
        name, levels = "model.decode_head.in_index", len(cfg.model.decode_head.in_index)
    if "out_indices" not in overrides:
        indices = tuple(config.num_outputs * (level + 1) // levels - 1 for level in range(levels))
        config = config.merged({"out_indices": indices})
    if len(config.out_indices) != levels:
        raise UserError(
            f"model.backbone.out_indices is {config.out_indices}, {len(config.out_indices)} maps; {name} has {levels}. "
            "They must be as many."
        )
    return config


def plan_training(cfg: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Fills in what depends on the training data: iterations for the batch at hand, learning rate, class weights.

    Returns:
        The derived numbers, for the log, and what the data are: classes, images and a digest of their names.
    """
    schedule = cfg.schedule
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    images = len(dataset)
    batch = cfg.train_dataloader.batch_size * get_world_size()
    iterations = schedule.max_iters or max(1, round(schedule.epochs * images / batch))
    warmup = min(round(schedule.warmup_epochs * images / batch), iterations // 2)
    interval = min(iterations, max(1, round(schedule.val_epochs * images / batch)))
    cfg.optim_wrapper.optimizer.lr *= batch / schedule.reference_batch_size

    if cfg.class_balance:
        weights = class_weights(dataset, cfg.class_balance)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.loss_decode.class_weight = weights

    cfg.train_cfg.update(max_iters=iterations, val_interval=interval)
    cfg.default_hooks.checkpoint.setdefault("interval", interval)
    poly = {"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "begin": warmup, "end": iterations, "by_epoch": False}
    ramp = {"type": "LinearLR", "start_factor": 1e-6, "begin": 0, "end": warmup, "by_epoch": False}
    cfg.param_scheduler = [ramp, poly] if warmup else [poly]
    derived = {
        "training_images": images,
        "batch_size": batch,
        "iterations": iterations,
        "warmup_iterations": warmup,
        "validation_every": interval,
        "learning_rate": cfg.optim_wrapper.optimizer.lr,
    }
    return derived, {"classes": dataset.metainfo["classes"], "images": images, "digest": dataset.digest()}
