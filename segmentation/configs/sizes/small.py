"""Overlay --size small: the same recipe as base; published for KAT-S, 46.1 mIoU (arXiv 2409.10594)."""
