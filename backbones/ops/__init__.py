"""The two operators: group-rational activation (alone or after a LayerNorm) and Fourier attention."""

from .fourier_attention import fourier_attention, fourier_mix, fourier_phi
from .rational import fuses, group_rational, norm_rational

__all__ = ["fourier_attention", "fourier_mix", "fourier_phi", "fuses", "group_rational", "norm_rational"]
