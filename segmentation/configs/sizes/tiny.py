"""Overlay --size tiny: the same schedule, with heads as wide as the backbone asks for."""

model = dict(decode_head=dict(channels=256), auxiliary_head=dict(channels=128))
