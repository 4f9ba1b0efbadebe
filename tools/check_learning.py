#!/usr/bin/env python
"""Fails unless every family of a comparison has learned: continuous integration runs it on the demo's own runs.

python tools/run_suite.py --backbones vit,karat,gated_karat --tasks classification,detection --out runs/check
python tools/check_learning.py runs/check
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, run_main

# A network whose operators are never trained has 4.7 times chance, one that only averages tokens 3.8 (docs/results.md):
# below 3 times, training has destroyed something.
MIN_TOP1_OVER_CHANCE = 3.0
# KArAt at one learning rate for all its tensors had 0.02 to 0.8 of vit's here; vit's own seeds differ by a sixth.
MIN_BOX_AP50_OVER_VIT = 0.7
_TOP1, _AP50 = "classification.top1", "detection.box_ap50"


def check(results: Mapping[str, Any]) -> list[str]:
    """What has not learned in results.json, a sentence each; controls may fail to.

    Raises:
        UserError: for a comparison without ``vit``, classification or detection, or with runs that failed.
    """
    figures = {name: row["figures"] for name, row in results["rows"].items() if not row["control"]}
    missing = [f"{name}: {figure}" for name in figures for figure in (_TOP1, _AP50) if not figures[name].get(figure)]
    if "vit" not in figures or missing:
        raise UserError(
            f"this comparison cannot be judged: {missing[0] if missing else 'vit'} is missing. It needs the row vit, "
            "and classification and detection of every row; the command is in tools/check_learning.py."
        )
    chance, vit = results["baselines"][_TOP1], figures["vit"][_AP50]["by_seed"]
    wrong = []
    for name, own in figures.items():
        for seed in vit:
            for figure, times, of, what in (
                (_TOP1, MIN_TOP1_OVER_CHANCE, chance, "chance"),
                (_AP50, MIN_BOX_AP50_OVER_VIT, vit[seed], "vit's"),
            ):
                value = own[figure]["by_seed"].get(seed, float("nan"))
                if not value >= times * of:
                    wrong.append(
                        f"{name}, seed {seed}: {figure} is {value:.1f}; {times:g} times {what} is {times * of:.1f}"
                    )
    return wrong


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of run_suite.py")
    results = read_json(parser.parse_args(argv).run / "results.json", "the comparison's figures")
    wrong = check(results)
    if wrong:
        raise UserError("not everything has learned:\n" + "\n".join(f"  {line}" for line in wrong))
    print(f"every family has learned: {', '.join(results['rows'])}")


if __name__ == "__main__":
    run_main(main)
