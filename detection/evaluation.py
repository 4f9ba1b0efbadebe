"""How good and how fast a detector is: COCO's figures, parameters, GFLOPs, images per second."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn

from backbones.training.measure import count_gflops, count_parameters, images_per_second, peak_memory_mb

from .backbone import find_trunk
from .loader import ReadableMapper, evaluation_loader, inference_mapper
from .state import load_trained

_NAMES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}


def has_compiled_detectron2() -> bool:
    """Whether this Detectron2 comes with its C++ extension; the fast COCO evaluation needs it."""
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


class ByClassEvaluator(COCOEvaluator):
    """Detectron2's, which gives AP by class, with AP at an IoU of 0.5 by class too (``AP50-name``)."""

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is None or not class_names:
            return results
        half = coco_eval.params.iouThrs.tolist().index(0.5)
        # (recalls, classes): all areas, the most detections per image; -1 where a class has no object.
        precision = coco_eval.eval["precision"][half, :, :, 0, -1]
        for name, values in zip(class_names, precision.T, strict=True):
            values = values[values > -1]
            results[f"AP50-{name}"] = float(100 * values.mean()) if values.size else math.nan
        return results


def evaluate(cfg: CfgNode, model: nn.Module, dataset: str) -> dict[str, Any]:
    """COCO figures in percent (box_ap, box_ap50, box_ap75, mask_ap, ..., by class); {} off the main process."""
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    distributed = comm.get_world_size() > 1
    # COCO's evaluation prints a page per task; the figures come back as a dict.
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        evaluator = ByClassEvaluator(dataset, tasks, distributed, use_fast_impl=has_compiled_detectron2())
        results = inference_on_dataset(model, evaluation_loader(cfg, dataset), evaluator)
    if not comm.is_main_process():
        return {}
    figures: dict[str, Any] = {}
    classes = MetadataCatalog.get(dataset).thing_classes
    for task, short in (("bbox", "box"), ("segm", "mask")):
        found = results.get(task, {})
        if task not in tasks:
            continue
        figures |= {f"{short}_{ours}": _finite(found.get(theirs), 0.0) for theirs, ours in _NAMES.items()}
        # With one class Detectron2 gives no table by class; a class without objects has no figure. Without predictions
        # it gives nothing by class.
        per_class = {name: _finite(found.get(f"AP-{name}"), None) for name in classes}
        figures[f"{short}_ap_per_class"] = per_class if len(classes) > 1 else {classes[0]: figures[f"{short}_ap"]}
        figures[f"{short}_ap50_per_class"] = {name: _finite(found.get(f"AP50-{name}", 0.0), None) for name in classes}
    return figures


def _finite(value: float | None, otherwise: float | None) -> float | None:
    return otherwise if value is None or not math.isfinite(value) else round(float(value), 4)


def measure_cost(cfg: CfgNode, model: nn.Module, dataset: str) -> dict[str, Any]:
    """Parameters, GFLOPs of the detector on one test image, images per second on one batch, peak memory so far."""
    batch = next(iter(evaluation_loader(cfg, dataset)))
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        cost = {
            "parameters": count_parameters(model),
            "backbone_parameters": count_parameters(find_trunk(model)[1]),
            "gflops": round(count_gflops(lambda: model(batch[:1])), 3),
            "images_per_s": round(images_per_second(lambda: model(batch), len(batch)), 2),
            "peak_memory_mb": round(peak_memory_mb(), 1),
        }
    model.train(training)
    return cost


@torch.no_grad()
def predict(run: str | Path, image_paths: list[str | Path], min_score: float = 0.05) -> list[dict[str, Any]]:
    """What a trained detector finds in images.

    Args:
        run: output folder of a training run, or its model.safetensors.
        image_paths: images of any size.
        min_score: smallest score to report.
    Returns:
        One dict per image, detections by falling score: boxes (N, 4) as x0, y0, x1, y1 in pixels of the file, scores
        (N,), labels (N,) counted from 0, names (N) of classes, masks (N, H, W) bool or None without a mask head.
    """
    model, cfg, categories = load_trained(run)
    mapper = ReadableMapper(inference_mapper(cfg))
    found = []
    for path in image_paths:
        instances = model([mapper({"file_name": str(path)})])[0]["instances"].to("cpu")
        instances = instances[instances.scores >= min_score]
        labels = instances.pred_classes.numpy()
        found.append(
            {
                "boxes": instances.pred_boxes.tensor.numpy(),
                "scores": instances.scores.numpy(),
                "labels": labels,
                "names": [categories[label][1] for label in labels],
                "masks": instances.pred_masks.numpy() if instances.has("pred_masks") else None,
            }
        )
    return found
