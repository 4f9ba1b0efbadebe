r"""UPerNet with KArAt attention and GR-KAN, on ADE20K.

Command: torchrun --nproc-per-node 8 tools/train_seg.py segmentation/configs/upernet_karkat.py --launcher pytorch \
             --cfg-options data_root=PATH model.backbone.weights=WEIGHTS
         python tools/train_seg.py segmentation/configs/upernet_karkat.py --size nano --cfg-options data_root=PATH
Needs:   at base size 8 GPUs with 2 images each; at nano size two CPU cores and a minute on the sample data.
Expect:  no published value; softmax attention with GR-KAN is 47.4 mIoU (arXiv 2409.10594).
"""

_base_ = "_base_/upernet_ade20k.py"

model = dict(backbone=dict(arch="karkat_base_patch16_224"))
