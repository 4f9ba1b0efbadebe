"""UPerNet on the ADE20K layout: everything the four comparisons share. What depends on other settings is derived.

segmentation/config.py fills in, when a config is loaded: the folders from ``data_root``; every crop, resize and padding
from ``crop_size``; widths of neck and heads and ``out_indices`` from ``model.backbone.arch``; the number of classes
from ``data_root/classes.json`` (ADE20K's 150 without it); iterations and learning rate from ``schedule``.
"""

custom_imports = dict(imports=["segmentation"], allow_failed_imports=False)
default_scope = "mmseg"

data_root = "data/ade/ADEChallengeData2016"
crop_size = 512
max_pixels = 2**28  # larger images and masks are not decoded
# The published schedule, 160,000 iterations of 16 of 20,210 images; a warm-up of 1,500. lr is for reference_batch_size
# and scales linearly with the batch. max_iters, when set, goes before epochs.
schedule = dict(epochs=126.7, warmup_epochs=1.19, val_epochs=12.67, reference_batch_size=16, max_iters=None)
class_balance = 0.0  # weigh the loss of a class by its frequency to minus this power; the published recipe does not
log_interval = 50
amp = True  # bf16 autocast, on GPUs that have it

norm_cfg = dict(type="SyncBN", requires_grad=True)  # plain BN in a single process
model = dict(
    type="CheckedEncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(type="KarvisBackbone", drop_path=0.1, attention=dict(), ffn=dict(), weights=None),
    neck=dict(type="Feature2Pyramid", rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type="UPerHead",
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide"),
)

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="PositionedSampler", shuffle=True),
    dataset=dict(
        type="ADELayoutDataset",
        split="training",
        pipeline=[
            dict(type="LoadCheckedImage"),
            dict(type="LoadCheckedAnnotations"),
            dict(type="RandomResize", ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ADELayoutDataset",
        split="validation",
        test_mode=True,
        pipeline=[
            dict(type="LoadCheckedImage"),
            dict(type="Resize", keep_ratio=True),
            # After Resize: the metric compares at the mask's own size.
            dict(type="LoadCheckedAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_evaluator = dict(type="DetailedIoUMetric", iou_metrics=["mIoU"])

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="KarvisOptimWrapperConstructor",
    # layer_decay: 0.65 to 0.9 is customary from self-supervised weights (MAE, BEiT). operator_lr: of the tensors of
    # KArAt's operators; or a factor of lr, 1.0 as in the paper.
    paramwise_cfg=dict(layer_decay=1.0, operator_lr="derived"),
    clip_grad=None,
)

train_cfg = dict(type="IterBasedTrainLoop")
val_cfg = dict(type="ValLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # Before each evaluation, after so many minutes, and beside the last those of every ``keep`` iterations.
    checkpoint=dict(type="ContractHook", minutes=30.0, keep=0),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="IterationSeedHook", priority="VERY_HIGH"),
    dict(type="MetricsHook"),
]
visualizer = dict(type="SegLocalVisualizer", vis_backends=[], name="visualizer")
log_processor = dict(by_epoch=False)
log_level = "WARNING"  # progress comes from MetricsHook; INFO adds mmengine's own log
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
load_from = None
resume = False
