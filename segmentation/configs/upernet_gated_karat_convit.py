r"""UPerNet with ConViT, gated positional attention and then softmax with gated KArAt beside it, on ADE20K.

Command: torchrun --nproc-per-node 8 tools/train_seg.py segmentation/configs/upernet_gated_karat_convit.py \
             --launcher pytorch --cfg-options data_root=PATH model.backbone.weights=WEIGHTS
         python tools/train_seg.py segmentation/configs/upernet_gated_karat_convit.py --size nano \
             --cfg-options data_root=PATH
Needs:   at tiny size 8 GPUs with 2 images each; at nano size two CPU cores and a minute on the sample data.
Expect:  no published value. It starts as the softmax network: weights of one keep their function.
"""

_base_ = "_base_/upernet_ade20k.py"

model = dict(backbone=dict(arch="gated_karat_convit_tiny_patch16_224"))
