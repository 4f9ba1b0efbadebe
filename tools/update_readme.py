#!/usr/bin/env python
"""Puts the demo's figures into docs/demo.json, README's table and its pictures.

make demo && python tools/update_readme.py runs/demo
"""

import argparse
import shutil
from pathlib import Path

from backbones.utils.errors import UserError, run_main
from backbones.utils.files import read_json, write_json, write_text
from report.page import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table of docs/demo.json -->\n", "<!-- end of table -->\n"
PICTURES = {"detection.png": "demo_detection.png", "learned_functions.png": "demo_learned_functions.png"}


def with_table(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"README.md has no place for the table; put the lines {BEGIN!r} and {END!r} around one.")
    return before + BEGIN + "\n" + table + "\n" + END + after


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output folder of make demo, such as runs/demo")
    run = Path(parser.parse_args(argv).run)
    results, speed = (read_json(run / name, "the demo's figures") for name in ("results.json", "speed.json"))
    text = with_table((ROOT / "README.md").read_text(encoding="utf-8"), markdown_table(results, speed))
    write_json(ROOT / "docs" / "demo.json", {"git_commit": results["git_commit"], "results": results, "speed": speed})
    for source, target in PICTURES.items():
        shutil.copyfile(run / "pictures" / source, ROOT / "docs" / target)
    write_text(ROOT / "README.md", text)
    print(f"README.md, docs/demo.json and {len(PICTURES)} pictures are those of {run}")


if __name__ == "__main__":
    run_main(main)
