"""Modules: attention (softmax, KArAt), feed-forwards (MLP, GR-KAN), windows, resampling of token axes."""
