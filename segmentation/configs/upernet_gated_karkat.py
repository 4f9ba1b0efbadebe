r"""UPerNet with softmax attention, gated KArAt beside it, and GR-KAN, on ADE20K.

Command: torchrun --nproc-per-node 8 tools/train_seg.py segmentation/configs/upernet_gated_karkat.py \
             --launcher pytorch --cfg-options data_root=PATH model.backbone.weights=WEIGHTS
         python tools/train_seg.py segmentation/configs/upernet_gated_karkat.py --size nano \
             --cfg-options data_root=PATH
Needs:   at base size 8 GPUs with 2 images each; at nano size two CPU cores and a minute on the sample data.
Expect:  no published value. It starts as the softmax network: weights of one keep their function.
"""

_base_ = "_base_/upernet_ade20k.py"

model = dict(backbone=dict(arch="gated_karkat_base_patch16_224"))
