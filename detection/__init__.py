"""Mask R-CNN on Karvis backbones with Detectron2, as ViTDet does it (arXiv 2203.16527)."""
