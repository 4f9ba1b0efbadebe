"""The two operators: group-rational activation (alone or after a LayerNorm) and Fourier attention."""

from .fourier_attention import fourier_attention
from .rational import fuses, group_rational, norm_rational

__all__ = ["fourier_attention", "fuses", "group_rational", "norm_rational"]
