#!/usr/bin/env python
"""Trains a backbone as an image classifier.

tools/pretrain_cls.py --config classification/recipes/nano.yaml data.root=PATH model.arch=karat_nano_patch8_64
torchrun --nproc-per-node 8 tools/pretrain_cls.py --config classification/recipes/karat.yaml data.root=IMAGENET
"""

import argparse
import json


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, see classification/recipes")
    parser.add_argument("--resume", action="store_true", help="continue the run in output")
    parser.add_argument("--eval-only", action="store_true", help="evaluate output's weights, or model.weights")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU when there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.epochs=10 output=runs/mine")
    arguments = parser.parse_args(argv)

    from classification.config import load_recipe
    from classification.engine import evaluate_only, train

    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.eval_only:
        evaluate_only(recipe, arguments.device)
    else:
        metrics = train(recipe, arguments.resume, arguments.device)
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    from backbones.utils.errors import run_main

    run_main(main)
