#!/usr/bin/env python
"""Puts the figures of a comparison into the documentation: its table, its pictures, and every single figure as JSON.

python tools/update_docs.py demo runs/demo          # README.md's table, of make demo
python tools/update_docs.py results runs/compare    # docs/results.md's table over seeds
"""

import argparse
import shutil
from pathlib import Path

from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, run_main
from backbones.utils.files import write_json, write_text
from report.page import markdown_table

ROOT = Path(__file__).resolve().parents[1]
# Name of a comparison to the page that shows it, and pictures of the report to their names in docs/.
PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "demo": (
        "README.md",
        {"detection.png": "demo_detection.png", "learned_functions.png": "demo_learned_functions.png"},
    ),
    "results": ("docs/results.md", {}),
    "size": ("docs/karat_training.md", {}),
    "placement": ("docs/results.md", {"sweep_placement_classification.top1.png": "sweep_placement.png"}),
}


def with_table(name: str, page: str, table: str) -> str:
    """The text ``page`` with ``table`` between the marks of the comparison ``name``."""
    begin, end = f"<!-- table of docs/{name}.json -->\n", f"<!-- end of docs/{name}.json -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{PAGES[name][0]} has no place for the table; put the lines {begin!r} and {end!r} around one.")
    return before + begin + "\n" + table + "\n" + end + after


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PAGES)
    parser.add_argument("run", type=Path, help="output folder of the comparison, such as runs/demo")
    arguments = parser.parse_args(argv)
    (page, pictures), run = PAGES[arguments.name], arguments.run
    results, speed = (read_json(run / name, "the comparison's figures") for name in ("results.json", "speed.json"))
    text = with_table(arguments.name, (ROOT / page).read_text(encoding="utf-8"), markdown_table(results, speed))
    figures = {"git_commit": results["git_commit"], "results": results, "speed": speed}
    write_json(ROOT / "docs" / f"{arguments.name}.json", figures)
    for source, target in pictures.items():
        shutil.copyfile(run / "pictures" / source, ROOT / "docs" / target)
    write_text(ROOT / page, text)
    print(f"{page} and docs/{arguments.name}.json show {run}")


if __name__ == "__main__":
    run_main(main)
