"""Trains and evaluates a detector: ViTDet's Mask R-CNN on any backbone of this project, with Detectron2.

    python tools/train_net.py --config detection/vitdet_karat.yaml --size nano --output runs/det \\
        DATASETS.TRAIN_JSON train.json DATASETS.TRAIN_IMAGES train \\
        DATASETS.TEST_JSON val.json DATASETS.TEST_IMAGES val
"""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from types import FrameType

os.environ.setdefault("PYTORCH_JIT", "0")  # Detectron2 scripts small functions on import, slowly

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from backbones.utils.errors import UserError, run_main
from detection.config import load_config
from detection.engine import evaluate_run, train


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "--config-file", required=True, help="a YAML of detection/ or your own")
    parser.add_argument("--size", help="nano, tiny, small or base; changes the preset and the budgets")
    parser.add_argument("--output", help="same as OUTPUT_DIR")
    parser.add_argument("--resume", action="store_true", help="continue from the output folder's checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS or the output folder's model")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0, the same on all machines")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="any config key")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    """One process of the run."""
    for noise in ("torch.meshgrid", "The given NumPy array is not writable"):  # Detectron2's, harmless
        warnings.filterwarnings("ignore", message=noise)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.INFO if comm.is_main_process() else logging.WARNING, format="%(message)s")
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    overrides = [*args.overrides, *(["OUTPUT_DIR", args.output] if args.output else [])]
    cfg = load_config(args.config, args.size, overrides)
    figures = evaluate_run(cfg) if args.eval_only else train(cfg, args.resume)
    if comm.is_main_process():
        print("  ".join(f"{k} {v}" for k, v in figures.items() if not isinstance(v, dict)))
        print(f"written to {cfg.OUTPUT_DIR}")


def join_torchrun() -> None:
    """Joins the processes that torchrun started."""
    local, gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def main(argv: list[str]) -> None:
    args = parse(argv)
    if "LOCAL_WORLD_SIZE" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join_torchrun()
        run(args)
        torch.distributed.destroy_process_group()
        return
    gpus = torch.cuda.device_count()
    if args.num_gpus < 1 or (gpus and args.num_gpus > gpus):
        raise UserError(f"--num-gpus is {args.num_gpus}; this machine has {gpus}.")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines needs --dist-url tcp://HOST:PORT of machine 0.")
    if args.num_gpus > 1:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
    try:
        launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
    except ProcessExitedException as error:
        if error.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            sys.exit(error.exit_code)  # it saved and said how to continue
        raise


def forward(number: int, _frame: FrameType | None) -> None:
    """Has the processes of the run, which this one only waits for, stop as they were asked to."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, number)


if __name__ == "__main__":
    run_main(main)
