r"""UPerNet with KArAt attention and MLP, on ADE20K.

Command: torchrun --nproc-per-node 8 tools/train_seg.py segmentation/configs/upernet_karat.py --launcher pytorch \
             --cfg-options data_root=PATH model.backbone.weights=WEIGHTS
         python tools/train_seg.py segmentation/configs/upernet_karat.py --size nano --cfg-options data_root=PATH
Needs:   at base size 8 GPUs with 2 images each; at nano size two CPU cores and a minute on the sample data.
Expect:  no published value; the softmax baseline is 47.2 mIoU (arXiv 2409.10594).
"""

_base_ = "_base_/upernet_ade20k.py"

model = dict(backbone=dict(arch="karat_base_patch16_224"))
