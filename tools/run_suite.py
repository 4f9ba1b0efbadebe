#!/usr/bin/env python
"""Compares backbones on classification, detection and segmentation, and writes results.json and report.html.

    python tools/run_suite.py --backbones vit,karat,kat,karkat --size nano --data sample --out runs/demo
    python tools/run_suite.py --backbones vit,kat --size base --data mine.yaml --out runs/mine

The same command continues a comparison that was interrupted.
"""

import argparse
import signal
import time
import warnings
from pathlib import Path

from make_sample_data import make_sample_data

from backbones.utils.errors import UserError, run_main
from backbones.utils.files import make_folder, read_json, write_json
from suite.plan import SAMPLE, check_families, check_size, make_jobs, read_data, sample_data
from suite.runner import default_jobs, run_jobs


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="vit,karat,kat,karkat", help="families to compare, separated by commas")
    parser.add_argument("--size", default="nano", help="nano, tiny, small or base; ConViT and Swin: the first two")
    parser.add_argument("--data", default="sample", metavar="sample|FILE", help="generated data, or a YAML of paths")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per GPU, else one per core")
    parser.add_argument("--quick", action="store_true", help="an epoch each on little data: a test of the machinery")
    arguments = parser.parse_args(argv)

    warnings.filterwarnings("ignore", category=UserWarning, module="torch.functional")  # Detectron2's meshgrid
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped also stops the runs
    began = time.monotonic()
    families = check_families(arguments.backbones)
    size = check_size(arguments.size, families)
    slots = default_jobs() if arguments.jobs is None else arguments.jobs
    if slots < 1:
        raise UserError(f"--jobs is {slots}; it must be at least 1.")
    out = Path(arguments.out).resolve()
    data = None if arguments.data == "sample" else read_data(arguments.data)
    settings = {"size": size, "data": data.to_dict() if data else "sample", "quick": arguments.quick}
    _check_settings(out, settings)
    if data is None:
        amount = SAMPLE["quick" if arguments.quick else "full"]
        data = sample_data(make_sample_data(out / "data", seed=0, **amount))
    jobs = make_jobs(families, size, data, out, arguments.quick)
    run_jobs(jobs, slots)

    from suite.report import print_table, write_report
    from suite.results import collect

    results = collect(jobs, size, settings, out)
    print_table(results)
    report = write_report(results, jobs, data, out)
    print(f"report: {report} (and results.json beside it), {(time.monotonic() - began) / 60:.1f} minutes")


def _check_settings(out: Path, settings: dict) -> None:
    """Keeps one folder to one comparison: figures of different settings are not compared."""
    path = make_folder(out) / "suite.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path, "settings")
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"{out} holds a comparison with another {changed[0]} ({before.get(changed[0])!r}, now "
            f"{settings[changed[0]]!r}). Choose another --out, or give the first command to continue it."
        )


if __name__ == "__main__":
    run_main(main)
