"""mmseg's IoUMetric, keeping each class's IoU and what always predicting the most frequent class would reach."""

from typing import Any

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from backbones.utils.errors import UserError


@METRICS.register_module()
class DetailedIoUMetric(IoUMetric):
    """mIoU, mAcc and aAcc as mmseg computes them; ``details`` holds the rest after an evaluation (main process)."""

    details: dict[str, Any] | None = None

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        intersect, union, _, label = (sum(areas) for areas in zip(*results, strict=True))
        intersect, union, label = (np.asarray(areas, dtype=np.float64) for areas in (intersect, union, label))
        with np.errstate(invalid="ignore"):
            iou = 100 * intersect / union
        present = label > 0
        if not present.any():
            raise UserError("the validation masks hold no labelled pixel, so there is nothing to measure.")
        self.details = {
            "miou": float(np.nanmean(iou)),
            "macc": float(100 * np.mean(intersect[present] / label[present])),
            "aacc": float(100 * intersect.sum() / label.sum()),
            "miou_most_frequent_class": float(100 * label.max() / label.sum() / present.sum()),
            # None: neither in the masks nor in the predictions
            "iou_per_class": {
                name: None if np.isnan(value) else float(value)
                for name, value in zip(self.dataset_meta["classes"], iou, strict=True)
            },
        }
        return metrics
