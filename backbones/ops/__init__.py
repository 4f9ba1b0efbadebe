"""The two operators: group-rational activation and Fourier attention."""

from .fourier_attention import fourier_attention
from .rational import group_rational

__all__ = ["fourier_attention", "group_rational"]
