"""The ViT trunk and its presets."""
