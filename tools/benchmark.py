#!/usr/bin/env python
"""Times operators and whole backbones against what they replace; a speed is printed only for right results.

    python tools/benchmark.py rational --device cpu --json rational.json
    python tools/benchmark.py attention --shapes base --grids 1,3 --dtype bf16
    python tools/benchmark.py model --archs vit_tiny_patch16_224,kat_tiny_patch16_224 --batch 128 --dtype bf16

docs/benchmarks.md says what the columns mean. Exit code 1 when something of this project's was wrong.
"""

import argparse

from backbones.utils.errors import UserError, check_choice, run_main

ROUNDS = {"rational": {"cpu": 31, "cuda": 51}, "attention": {"cpu": 11, "cuda": 31}, "model": {"cpu": 5, "cuda": 21}}
ARCHS = ",".join(f"{family}_tiny_patch16_224" for family in ("vit", "kat", "karat", "karkat"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="rational|attention|model")
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
    attention = commands.add_parser("attention", help="KArAt's attention against softmax and its own naive form")
    attention.set_defaults(run=run_attention)
    attention.add_argument(
        "--shapes", help="BxHxNxD or a name, by commas; default: cpu, or tiny,small,base,swin,vitdet,long on a GPU"
    )
    attention.add_argument("--dtype", help="fp32, bf16, fp16, by commas; default: bf16 on a GPU, else fp32")
    attention.add_argument("--grids", default="1,3,11", help="harmonics G, by commas")
    attention.add_argument("--rank", type=int, default=12, help="r; at most N")
    attention.add_argument("--orders", default="w_phi,phi_w", help="orders of W and the functions, by commas")
    attention.add_argument("--contestants", help="by commas, SDPA runs always; default: all")
    model = commands.add_parser("model", help="whole backbones: images per second forward and in training")
    model.set_defaults(run=run_model)
    model.add_argument(
        "--archs",
        default=ARCHS,
        help="presets, by commas, with settings as in NAME+attention.order=phi_w+window_size=14",
    )
    model.add_argument("--maps", type=int, metavar="PIXELS", help="as a detector's backbone for images of this size")
    model.add_argument("--batch", type=int, help="images at a time; default: 128 on a GPU, else 8")
    model.add_argument("--dtype", help="fp32, or bf16 for autocast; default: bf16 on a GPU")
    model.add_argument("--compile", action="store_true", help="run the networks through torch.compile")
    for command in (rational, attention, model):
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
        SHAPES,
        check_positive,
        check_widths,
        parse_degrees,
        parse_dtypes,
        parse_list,
        parse_shapes,
    )
    from bench.report import OPERATOR_COLUMNS

    groups, degrees = check_positive("--groups", arguments.groups), parse_degrees(arguments.degrees)
    check_choice("--form", arguments.form, FORMS)
    dtypes = parse_dtypes(arguments.dtype)
    shapes = parse_shapes(arguments.shapes or DEFAULT_SHAPES[device.type], SHAPES, "BNC")
    check_widths(shapes, groups)
    wanted = parse_list("--cases", arguments.cases) if arguments.cases else [case.name for case in CASES]
    for case in wanted:
        check_choice("--cases", case, [c.name for c in CASES])
    chosen = chosen_contestants(arguments.contestants, CASES)
    rows = []
    for case in (case for case in CASES if case.name in wanted):
        for shape in shapes:
            for dtype in dtypes:
                problem = Problem(shape, DTYPES[dtype], device, groups, degrees, arguments.form)
                rows += run_case(case, problem, dtype, chosen, rounds, arguments.seed)
                save(rows, OPERATOR_COLUMNS)
    return rows, OPERATOR_COLUMNS, any(row["problem"] for row in rows if row["contestant"] == "karvis")


def run_attention(arguments: argparse.Namespace, device, rounds: int, save) -> tuple[list[dict], list, bool]:
    """Rows of every order, shape, number of harmonics and type, saved after each."""
    from backbones.ops.fourier_attention import ORDERS
    from bench.attention import AttentionProblem, attention_case
    from bench.operators import run_case
    from bench.options import (
        ATTENTION_SHAPES,
        DEFAULT_ATTENTION_SHAPES,
        DTYPES,
        check_positive,
        parse_dtypes,
        parse_list,
        parse_numbers,
        parse_shapes,
        show_shape,
    )
    from bench.report import ATTENTION_COLUMNS

    rank, grids = check_positive("--rank", arguments.rank), parse_numbers("--grids", arguments.grids)
    dtypes = parse_dtypes(arguments.dtype or ("bf16" if device.type == "cuda" else "fp32"))
    shapes = parse_shapes(arguments.shapes or DEFAULT_ATTENTION_SHAPES[device.type], ATTENTION_SHAPES, "BHND")
    for shape in shapes:
        if rank > shape[2]:
            raise UserError(f"--rank is {rank}; it must be at most N, which is {shape[2]} in {show_shape(shape)}.")
    orders = parse_list("--orders", arguments.orders)
    for order in orders:
        check_choice("--orders", order, ORDERS)
    cases = {(order, grid): attention_case(order, grid, rank) for order in orders for grid in grids}
    chosen = chosen_contestants(arguments.contestants, cases.values())
    rows = []
    for shape in shapes:
        for (order, grid), case in cases.items():
            for dtype in dtypes:
                problem = AttentionProblem(shape, DTYPES[dtype], device, grid, rank, order)
                rows += run_case(case, problem, dtype, chosen, rounds, arguments.seed)
                save(rows, ATTENTION_COLUMNS)
    return rows, ATTENTION_COLUMNS, any(row["problem"] for row in rows if row["contestant"] == "karvis")


def chosen_contestants(text: str | None, cases) -> list[str] | None:
    """The names in ``--contestants``, each of a contestant of some case; None for all."""
    from bench.options import parse_list

    chosen = parse_list("--contestants", text) if text else None
    known = dict.fromkeys(name for case in cases for name in (case.yardstick.name, *(c.name for c in case.contestants)))
    for contestant in chosen or []:
        check_choice("--contestants", contestant, known)
    return chosen


def run_model(arguments: argparse.Namespace, device, rounds: int, save) -> tuple[list[dict], list, bool]:
    """Rows of every preset."""
    from bench.models import parse_network, run_models
    from bench.options import check_positive, parse_dtypes, parse_list
    from bench.report import MODEL_COLUMNS

    archs = parse_list("--archs", arguments.archs)
    maps = None if arguments.maps is None else check_positive("--maps", arguments.maps)
    for arch in archs:
        parse_network(arch, maps)
    on_gpu = device.type == "cuda"
    batch = check_positive("--batch", (128 if on_gpu else 8) if arguments.batch is None else arguments.batch)
    dtype = parse_dtypes(arguments.dtype or ("bf16" if on_gpu else "fp32"), ("fp32", "bf16"))
    if len(dtype) > 1:
        raise UserError(f"--dtype is {arguments.dtype!r}; a model runs in one type at a time. Choose fp32 or bf16.")
    rows = run_models(archs, batch, dtype[0], device, arguments.compile, rounds, arguments.seed, maps)
    save(rows, MODEL_COLUMNS)
    return rows, MODEL_COLUMNS, any(row["problem"] for row in rows)


if __name__ == "__main__":
    run_main(main)
