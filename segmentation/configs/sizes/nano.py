"""Overlay --size nano: images and crops of 64 pixels for CPUs; about a minute on the sample data on one core.

Expect there, from weights pretrained by classification/recipes/nano.yaml: docs/results.md has the table.
"""

crop_size = 64
log_interval = 10
class_balance = 0.5  # most pixels are background: in few iterations nothing else would be learned
schedule = dict(epochs=8, warmup_epochs=0.5, val_epochs=4, reference_batch_size=16)

model = dict(
    # Patch 8: strides 4, 8, 16 and 32, as for patch 16.
    neck=dict(rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(channels=64),
    auxiliary_head=dict(channels=32),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        pipeline=[
            dict(type="LoadCheckedImage"),
            dict(type="LoadCheckedAnnotations"),
            dict(type="RandomResize", ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", cat_max_ratio=0.95),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ]
    ),
)
val_dataloader = dict(num_workers=0, persistent_workers=False)
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay=0.5),  # equal rates wipe out what the backbone was pretrained with
    clip_grad=dict(_delete_=True, max_norm=1.0),
)
