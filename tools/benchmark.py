#!/usr/bin/env python
"""Times operators and whole backbones against what they replace; a speed is printed only for right results.

    python tools/benchmark.py rational --device cpu --json rational.json
    python tools/benchmark.py model --archs vit_tiny_patch16_224,kat_tiny_patch16_224 --batch 128 --dtype bf16

docs/benchmarks.md says what the columns mean. Exit code 1 when something of this project's was wrong.
"""

import argparse

from backbones.utils.errors import UserError, check_choice, run_main

ROUNDS = {"rational": {"cpu": 31, "cuda": 51}, "model": {"cpu": 5, "cuda": 21}}
ARCHS = ",".join(f"{family}_tiny_patch16_224" for family in ("vit", "kat", "karat", "karkat"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="rational|model")
    rational = commands.add_parser("rational", help="the group-rational activation against GELU and other kernels")
    rational.set_defaults(run=run_rational)
    rational.add_argument(
        "--shapes", help="BxNxC or a name, by commas; default: cpu, or paper,tiny,small,base on a GPU"
    )
    rational.add_argument("--dtype", default="fp32,bf16", help="fp32, bf16, fp16, by commas")
    rational.add_argument("--groups", type=int, default=8, help="channel groups; divides the width")
    rational.add_argument("--degrees", default="5,4", metavar="M,N", help="of numerator and denominator")
    rational.add_argument("--form", default="sum_abs", help="denominator: sum_abs or abs_sum")
    rational.add_argument("--cases", help="operators, by commas; default: all")
    rational.add_argument("--contestants", help="by commas, GELU runs always; default: all")
    model = commands.add_parser("model", help="whole backbones: images per second forward and in training")
    model.set_defaults(run=run_model)
    model.add_argument("--archs", default=ARCHS, help="presets, by commas; ratios are to the first")
    model.add_argument("--batch", type=int, help="images at a time; default: 128 on a GPU, else 8")
    model.add_argument("--dtype", help="fp32, or bf16 for autocast; default: bf16 on a GPU")
    model.add_argument("--compile", action="store_true", help="run the networks through torch.compile")
    for command in (rational, model):
        command.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU when there is one")
        command.add_argument("--rounds", type=int, help="timed rounds, of which the median counts")
        command.add_argument("--threads", type=int, help="CPU threads; 1 on a machine that others use too")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", metavar="FILE", help="write all figures, versions and the command here")
        command.add_argument("--markdown", metavar="FILE", help="write the table here")
    arguments = parser.parse_args(argv)

    import torch

    from bench.options import check_positive, parse_device
    from bench.report import environment, print_table, write

    device = parse_device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    if arguments.threads is not None:
        torch.set_num_threads(check_positive("--threads", arguments.threads))
    rounds = ROUNDS[arguments.command][device.type] if arguments.rounds is None else arguments.rounds
    about = environment(device, argv, arguments.seed)

    def save(rows: list[dict], columns: list) -> None:
        write(rows, columns, about, arguments.json, arguments.markdown)

    rows, columns, failed = arguments.run(arguments, device, check_positive("--rounds", rounds), save)
    print_table(rows, columns, about)
    return 1 if failed else 0


def run_rational(arguments: argparse.Namespace, device, rounds: int, save) -> tuple[list[dict], list, bool]:
    """Rows of every case, shape and type, saved after each so that a run cut short leaves what it had."""
    from backbones.ops.rational import FORMS
    from bench.cases import CASES, Problem
    from bench.operators import run_case
    from bench.options import (
        DEFAULT_SHAPES,
        DTYPES,
        check_positive,
        parse_degrees,
        parse_dtypes,
        parse_list,
        parse_shapes,
    )
    from bench.report import OPERATOR_COLUMNS

    groups, degrees = check_positive("--groups", arguments.groups), parse_degrees(arguments.degrees)
    check_choice("--form", arguments.form, FORMS)
    dtypes = parse_dtypes(arguments.dtype)
    shapes = parse_shapes(arguments.shapes or DEFAULT_SHAPES[device.type], groups)
    wanted = parse_list("--cases", arguments.cases) if arguments.cases else [case.name for case in CASES]
    chosen = parse_list("--contestants", arguments.contestants) if arguments.contestants else None
    for case in wanted:
        check_choice("--cases", case, [c.name for c in CASES])
    known = dict.fromkeys(name for case in CASES for name in (case.yardstick.name, *(c.name for c in case.contestants)))
    for contestant in chosen or []:
        check_choice("--contestants", contestant, known)
    rows = []
    for case in (case for case in CASES if case.name in wanted):
        for shape in shapes:
            for dtype in dtypes:
                problem = Problem(shape, DTYPES[dtype], device, groups, degrees, arguments.form)
                rows += run_case(case, problem, dtype, chosen, rounds, arguments.seed)
                save(rows, OPERATOR_COLUMNS)
    return rows, OPERATOR_COLUMNS, any(row["problem"] for row in rows if row["contestant"] == "karvis")


def run_model(arguments: argparse.Namespace, device, rounds: int, save) -> tuple[list[dict], list, bool]:
    """Rows of every preset."""
    from backbones.models.presets import preset_config
    from bench.models import run_models
    from bench.options import check_positive, parse_dtypes, parse_list
    from bench.report import MODEL_COLUMNS

    archs = parse_list("--archs", arguments.archs)
    for arch in archs:
        preset_config(arch)
    on_gpu = device.type == "cuda"
    batch = check_positive("--batch", (128 if on_gpu else 8) if arguments.batch is None else arguments.batch)
    dtype = parse_dtypes(arguments.dtype or ("bf16" if on_gpu else "fp32"), ("fp32", "bf16"))
    if len(dtype) > 1:
        raise UserError(f"--dtype is {arguments.dtype!r}; a model runs in one type at a time. Choose fp32 or bf16.")
    rows = run_models(archs, batch, dtype[0], device, arguments.compile, rounds, arguments.seed)
    save(rows, MODEL_COLUMNS)
    return rows, MODEL_COLUMNS, any(row["problem"] for row in rows)


if __name__ == "__main__":
    run_main(main)
