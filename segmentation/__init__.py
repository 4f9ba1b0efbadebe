"""Semantic segmentation: our backbones in MMSegmentation. Importing this registers every class the configs name."""

import warnings

# Compiled operators that no model here uses, and a default that mmseg's own ADE20K configs keep.
warnings.filterwarnings("ignore", message="Fail to import ``MultiScaleDeformableAttention``")
warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")

from . import backbone, datasets, hooks, metric, optim, transforms  # noqa: E402

__all__ = ["backbone", "datasets", "hooks", "metric", "optim", "transforms"]
