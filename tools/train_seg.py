"""Trains or evaluates a segmentor: UPerNet on one of our backbones, with MMSegmentation.

    python tools/train_seg.py segmentation/configs/upernet_karat.py --size nano --cfg-options data_root=PATH
    python tools/train_seg.py segmentation/configs/upernet_karat.py --size nano --eval-only --work-dir RUN
    torchrun --nproc-per-node 8 tools/train_seg.py segmentation/configs/upernet_karat.py --launcher pytorch

Data is a folder in the ADE20K layout: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png.
"""

import argparse

from mmengine.config import DictAction

from backbones.models.presets import SIZES
from backbones.utils.errors import run_main


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of segmentation/configs")
    parser.add_argument("--size", choices=SIZES["vit"], help="the same recipe at another size; nano is for CPUs")
    parser.add_argument("--work-dir", help="output folder (default: runs/seg_CONFIG_SIZE)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate load_from, or the weights in the output folder"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm"), default="none", help="pytorch with torchrun"
    )
    args = parser.parse_args(argv)

    from segmentation.config import load_config
    from segmentation.engine import evaluate, train

    cfg = load_config(args.config, args.size, args.cfg_options, args.work_dir)
    cfg.launcher = args.launcher
    if args.eval_only:
        evaluate(cfg)
    else:
        train(cfg, resume=args.resume)


if __name__ == "__main__":
    run_main(main)
