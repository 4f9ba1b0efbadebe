"""Pretraining and evaluation of a backbone as an image classifier, on timm's parts."""
