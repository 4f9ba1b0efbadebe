"""Kolmogorov-Arnold vision backbones: KArAt attention and GR-KAN feed-forwards in one ViT trunk."""

from .config import BackboneConfig
from .layer_config import AttentionConfig, FfnConfig
from .models.presets import list_backbones
from .registry import create_backbone, register_with_timm

__all__ = ["AttentionConfig", "BackboneConfig", "FfnConfig", "create_backbone", "list_backbones"]

register_with_timm()
