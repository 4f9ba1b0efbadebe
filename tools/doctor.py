"""Checks this machine: versions, Detectron2, compiler, GPU, each op against its reference, one backbone per framework.

    python tools/doctor.py

For each problem it prints the command that solves it. Exit code 1 when something needed is broken; a missing GPU,
compiler or compiled Detectron2 module is a note.
"""

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

os.environ.setdefault("PYTORCH_JIT", "0")  # Detectron2 compiles TorchScript at import otherwise
ROOT = Path(__file__).resolve().parents[1]
SETUP = "make setup"
REINSTALL = "make clean setup"
# Import name, distribution.
PACKAGES = [
    ("torch", "torch"),
    ("torchvision", "torchvision"),
    ("timm", "timm"),
    ("safetensors", "safetensors"),
    ("numpy", "numpy"),
    ("PIL", "pillow"),
    ("cv2", "opencv-python"),
    ("skimage", "scikit-image"),
    ("pycocotools", "pycocotools"),
    ("tensorboard", "tensorboard"),
    ("mmengine", "onedl-mmengine"),
    ("mmcv", "onedl-mmcv"),
    ("mmseg", "onedl-mmsegmentation"),
]


class Report:
    """Prints one line per check and counts what is broken."""

    def __init__(self) -> None:
        self.broken = 0

    def ok(self, name: str, text: str) -> None:
        print(f"  ok      {name}: {text}")

    def note(self, name: str, text: str, command: str) -> None:
        print(f"  note    {name}: {text}\n          {command}")

    def fail(self, name: str, problem: object, command: str = REINSTALL) -> None:
        self.broken += 1
        print(f"  BROKEN  {name}: {problem}\n          run: {command}")

    def check(self, name: str, run: Callable[[], str], command: str = REINSTALL) -> None:
        """Reports what ``run`` returns, or the exception it raises."""
        try:
            self.ok(name, run())
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {_first_line(error)}", command)


def main() -> int:
    """Runs every check; returns the exit code."""
    warnings.filterwarnings("ignore")
    report = Report()
    print("machine")
    check_machine(report)
    print("packages")
    locked = _locked_versions()
    for module, distribution in PACKAGES:
        report.check(distribution, lambda m=module, d=distribution: _version(m, d), SETUP)
        found = _installed(distribution)
        if found and locked.get(distribution) and found not in locked[distribution]:
            text = f"{found} is installed, requirements.lock has {' or '.join(sorted(locked[distribution]))}"
            report.note(distribution, text, f"for the tested version: {REINSTALL}")
    check_detectron2(report)
    report.check("karvis", _project, SETUP)
    print("hardware and compilers")
    check_hardware(report)
    print("operators")
    report.check("group_rational", check_group_rational)
    report.check("fourier_attention", check_fourier_attention)
    print("backbones")
    for framework, run in (("timm", check_timm), ("detectron2", check_vitdet), ("mmsegmentation", check_mmseg)):
        report.check(framework, run)
    print(f"\n{report.broken} broken" if report.broken else "\neverything needed works")
    return 1 if report.broken else 0


def check_machine(report: Report) -> None:
    """Python, memory and disk."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 13):
        report.ok("python", f"{version} at {sys.executable}")
    else:
        report.fail("python", f"{version}; 3.11 or 3.12 is needed", "make PYTHON=/path/to/python3.11 clean setup")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free >= 1:
        report.ok("disk", f"{free:.0f} GB free at {ROOT}")
    else:
        report.fail("disk", f"{free:.1f} GB free at {ROOT}; runs need at least 1", f"du -xh -d 1 {ROOT} | sort -h")
    report.ok("cpu", f"{os.cpu_count()} cores, {platform.machine()}")


def check_detectron2(report: Report) -> None:
    """Which Detectron2, and whether its compiled module is there."""

    def source() -> str:
        module = importlib.import_module("detectron2")
        importlib.import_module("detectron2.modeling")
        names = {d.metadata["Name"] for d in metadata.distributions()}
        origin = "the official source" if "detectron2" in names else "the wheel sal-detectron2"
        return f"{module.__version__} from {origin}"

    report.check("detectron2", source, SETUP)
    try:
        importlib.import_module("detectron2._C")
        report.ok("detectron2._C", "compiled operators are there")
    except ImportError:
        text = "no compiled operators; no model here needs them"
        report.note("detectron2._C", text, f"to have them: {sys.executable} tools/install_detectron2.py, with network")


def check_hardware(report: Report) -> None:
    """GPU, Triton and a C++ compiler: each makes things faster, none is needed."""
    try:
        import torch

        if torch.cuda.is_available():
            report.ok("gpu", f"{torch.cuda.get_device_name()}, bf16 {torch.cuda.is_bf16_supported()}")
        else:
            report.note("gpu", "none that torch can use; everything runs on the CPU", "to look for one: nvidia-smi")
    except Exception as error:
        report.note("gpu", f"unknown, torch does not start ({_first_line(error)})", SETUP)
    try:
        report.ok("triton", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        report.note("triton", "not installed; kernels run on their reference path", SETUP)
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        report.ok("c++ compiler", compiler)
    else:
        report.note("c++ compiler", "none; torch.compile on a CPU needs one", "sudo apt-get install g++")


def check_group_rational() -> str:
    """The group-rational activation and its gradients against the reference."""
    from backbones.ops import group_rational
    from backbones.ops.rational.reference import group_rational_reference

    return _compare(group_rational, group_rational_reference, [(2, 5, 16), (1, 6), (4, 4)])


def check_fourier_attention() -> str:
    """Fourier attention's functions of the scores, with a mask, and their gradients, against the reference."""
    import torch

    from backbones.ops import fourier_phi
    from backbones.ops.fourier_attention.reference import fourier_phi_reference

    mask = torch.ones(2, 7, dtype=torch.bool, device=_device())
    mask[:, -2:] = False
    shapes = [(2, 3, 7, 16), (2, 3, 7, 16), (3, 2, 5, 7), (3, 2, 5, 7)]
    return _compare(lambda *t: fourier_phi(*t, mask, 0.5), lambda *t: fourier_phi_reference(*t, mask, 0.5), shapes)


def check_timm() -> str:
    """A forward pass of a backbone created by timm."""
    import timm
    import torch

    import backbones  # noqa: F401  (registers the presets)

    logits = timm.create_model("karkat_nano_patch8_64", num_classes=10).eval()(torch.zeros(1, 3, 64, 64))
    return f"karkat_nano_patch8_64 gives logits {tuple(logits.shape)}"


def check_vitdet() -> str:
    """A forward pass of the backbone registered with Detectron2."""
    import torch
    from detectron2.modeling import build_backbone

    from detection.config import load_config, resolve

    cfg = resolve(load_config(ROOT / "detection" / "vitdet_karkat.yaml", "nano"))
    maps = build_backbone(cfg).eval()(torch.zeros(1, 3, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE))
    return "maps " + ", ".join(f"{name} {tuple(m.shape[-2:])}" for name, m in maps.items())


def check_mmseg() -> str:
    """A forward pass of the backbone registered with MMSegmentation."""
    import torch
    from mmseg.registry import MODELS

    import segmentation  # noqa: F401  (registers the backbone)

    net = MODELS.build({"type": "KarvisBackbone", "arch": "karkat_nano_patch8_64", "out_indices": (2, 5)}).eval()
    return f"maps {', '.join(str(tuple(m.shape[-2:])) for m in net(torch.zeros(1, 3, 64, 64)))}"


def _compare(ours, reference, shapes: list[tuple[int, ...]]) -> str:
    """The kernel that runs on this machine, in float32, against the reference in float64."""
    import torch

    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=_device(), requires_grad=True) for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    pairs = [(ours(*inputs), reference(*exact))]
    gradient = torch.randn_like(pairs[0][0])
    ours, reference = (
        torch.autograd.grad(out, leaves, gradient.to(out.dtype))
        for out, leaves in zip(pairs[0], (inputs, exact), strict=True)
    )
    pairs += zip(ours, reference, strict=True)
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if not error < 1e-5:
        raise ArithmeticError(f"differs from the reference by {error:.1e} (relative)")
    return f"equals its reference on {inputs[0].device.type}, gradients included ({error:.0e})"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _version(module: str, distribution: str) -> str:
    importlib.import_module(module)
    return metadata.version(distribution)


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _locked_versions() -> dict[str, set[str]]:
    """Versions per distribution; a package may have one per Python version."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, separator, rest = line.partition("==")
        if separator and not line.startswith((" ", "#")):
            versions.setdefault(name, set()).add(rest.split()[0])
    return versions


def _project() -> str:
    import backbones

    return f"{metadata.version('karvis')} at {Path(backbones.__file__).parents[1]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
