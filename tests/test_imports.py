"""Imports go one way: backbones <- classification, detection, segmentation <- suite <- report <- tools."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "backbones": {
        "classification",
        "detection",
        "segmentation",
        "suite",
        "report",
        "detectron2",
        "mmengine",
        "mmcv",
        "mmseg",
    },
    "classification": {"detection", "segmentation", "suite", "report", "detectron2", "mmengine", "mmcv", "mmseg"},
    "detection": {"classification", "segmentation", "suite", "report", "mmengine", "mmcv", "mmseg"},
    "segmentation": {"classification", "detection", "suite", "report", "detectron2"},
    "tools/suite": {"report"},
    "backbones/models": {"training"},
    "backbones/layers": {"models", "training"},
    "backbones/ops": {"layers", "models", "training"},
    "backbones/utils": {"layers", "models", "ops", "training"},
}


def imported(path):
    """Top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 2:  # from a sibling of the package
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_nothing_above_or_beside_it(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [f"{f.relative_to(ROOT)}: {name}" for f in files for name in imported(f) if name in FORBIDDEN[package]]
    assert not wrong


def test_importing_backbones_brings_in_no_triton_kernel_and_no_framework():
    code = "import sys, backbones; print([m for m in ('detectron2', 'mmengine', 'mmseg') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
