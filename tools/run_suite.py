#!/usr/bin/env python
"""Compares backbones on classification, detection and segmentation, and writes results.json and report.html.

    python tools/run_suite.py --backbones vit,karat,kat,karkat,uniform --size nano --data sample --out runs/demo
    python tools/run_suite.py --backbones vit,kat --size base --data mine.yaml --seeds 3 --out runs/mine
    python tools/run_suite.py --variants docs/variants_placement.yaml --tasks classification --seeds 3 --out runs/place

The same command continues a comparison that was interrupted; more backbones, variants, tasks or seeds add to it.
"""

import argparse
import json
import logging
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_sample_data

from backbones.training.folder import Claim
from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, run_main
from backbones.utils.files import make_folder, write_json
from suite.plan import SAMPLE, check_settings, check_size, check_tasks, make_jobs, read_data, sample_data
from suite.rows import TASKS, Row, named_rows
from suite.runner import default_jobs, run_jobs
from suite.speed import measure_rows
from suite.variants import read_variants

DEFAULT = "vit,karat,kat,karkat"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbones",
        help=f"families and controls to compare, separated by commas (default, without variants: {DEFAULT})",
    )
    parser.add_argument("--variants", metavar="FILE", help="YAML: more rows, of any settings; see docs/comparison.md")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind, with seeds 0, 1, ...")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of these; classification always is, as pretraining")
    parser.add_argument("--size", default="nano", help="nano, tiny, small or base; ConViT and Swin: the first two")
    parser.add_argument("--data", default="sample", metavar="sample|FILE", help="generated data, or a YAML of paths")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per GPU, else one per core")
    parser.add_argument("--quick", action="store_true", help="an epoch each on little data: a test of the machinery")
    arguments = parser.parse_args(argv)

    warnings.filterwarnings("ignore", category=UserWarning, module="torch.functional")  # Detectron2's meshgrid
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped also stops the runs
    began = time.monotonic()
    for name, value in (("--seeds", arguments.seeds), ("--jobs", arguments.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    named = arguments.backbones or ("" if arguments.variants else DEFAULT)
    rows = named_rows(named) if named or not arguments.variants else []
    variants = read_variants(arguments.variants, arguments.size, rows) if arguments.variants else []
    rows += variants
    size, tasks = check_size(arguments.size, rows), check_tasks(arguments.tasks)
    slots = arguments.jobs or default_jobs()
    out = Path(arguments.out).resolve()
    data = None if arguments.data == "sample" else read_data(arguments.data)
    fixed = {"size": size, "data": data.to_dict() if data else f"sample, format {make_sample_data.FORMAT}"}
    with Claim(out):
        settings, rows = _extend(out, fixed | {"quick": arguments.quick}, rows, tasks, arguments.seeds)
        if data is None:
            amount = SAMPLE["quick" if arguments.quick else "full"]
            data = sample_data(make_sample_data.make_sample_data(out / "data", seed=0, **amount))
        jobs = make_jobs(rows, size, data, out, settings["seeds"], settings["tasks"], arguments.quick)
        where = {row.name: f"--variants {arguments.variants}: " for row in variants}
        check_settings([job for job in jobs if job.seed == 0], where)
        write_json(out / "suite.json", settings | {"rows": [row.to_dict() for row in rows]})
        failures = run_jobs(jobs, slots)
        speed = measure_rows(rows, size, out / "speed.json")

        from report.page import print_table, write_report
        from report.results import collect

        shown = settings | {"seeds": list(range(settings["seeds"]))}
        results = collect(rows, jobs, failures, data, shown, out)
        print_table(results, speed)
        report = write_report(results, speed, jobs, data, out)
        print(f"report: {report} (and results.json beside it), {(time.monotonic() - began) / 60:.1f} minutes")
        if failures:
            name, end = next(iter(failures.items()))
            raise UserError(
                f"{len(failures)} of {len(jobs)} runs failed. The first, {name}, ended with:\n"
                + "\n".join(f"  {line}" for line in end.splitlines())
                + "\nMend the cause and give the same command again: finished runs are kept."
            )


def _extend(
    out: Path, fixed: dict[str, Any], rows: Sequence[Row], tasks: Sequence[str], seeds: int
) -> tuple[dict[str, Any], list[Row]]:
    """The settings and rows of the comparison in ``out``, with what this command adds to it.

    Raises:
        UserError: naming what differs, in the settings that all its runs share or in a row of the same name.
    """
    path = make_folder(out) / "suite.json"
    before = read_json(path, "settings") if path.exists() else {}
    hint = "Choose another --out, or give the first command to continue it."
    for key, value in json.loads(json.dumps(fixed)).items():
        if before and before.get(key) != value:
            raise UserError(f"{out} holds a comparison with another {key} ({before.get(key)!r}, now {value!r}). {hint}")
    known = {row["name"]: Row(**row) for row in before.get("rows", ())}
    for row in rows:
        old, new = known.setdefault(row.name, row).to_dict(), json.loads(json.dumps(row.to_dict()))
        changed = next((key for key in new if old[key] != new[key]), None)
        if changed:
            raise UserError(
                f"{out} holds a row {row.name!r} with another {changed} ({old[changed]!r}, now {new[changed]!r}). "
                f"Give it another name. {hint}"
            )
    settings = fixed | {
        "tasks": [task for task in TASKS if task in tasks or task in before.get("tasks", ())],
        "seeds": max(seeds, before.get("seeds", 1)),
    }
    return settings, list(known.values())


if __name__ == "__main__":
    run_main(main)
