"""Overlay --size base: the recipe as published, which the configs hold already."""
