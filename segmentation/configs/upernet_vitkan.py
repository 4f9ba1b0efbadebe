r"""UPerNet with softmax attention and B-spline KAN feed-forwards: a baseline, on ADE20K.

Command: python tools/train_seg.py segmentation/configs/upernet_vitkan.py --size nano --cfg-options data_root=PATH
Needs:   for the feed-forwards about 40 times the activation memory of upernet_softmax.py; meant for --size nano.
Expect:  at most softmax's mIoU; no segmentor with this backbone is published.
"""

_base_ = "_base_/upernet_ade20k.py"

model = dict(backbone=dict(arch="vitkan_base_patch16_224"))
