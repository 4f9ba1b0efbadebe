"""Semantic segmentation: our backbones in MMSegmentation. Importing this registers every class the configs name."""

import contextlib
import io
import warnings

# Compiled operators that no model here uses, and a default that mmseg's own ADE20K configs keep.
warnings.filterwarnings("ignore", message="Fail to import ``MultiScaleDeformableAttention``")
warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")

with contextlib.redirect_stdout(io.StringIO()):  # mmseg prints which optional cloud services it did not find
    import mmseg.datasets
    import mmseg.models  # noqa: F401

from . import backbone, datasets, hooks, metric, optim, pretrained, transforms  # noqa: E402

__all__ = ["backbone", "datasets", "hooks", "metric", "optim", "pretrained", "transforms"]
