"""The figures of a comparison: what each run wrote, speeds measured side by side, and the baselines to beat."""

from pathlib import Path
from typing import Any

import torch

from backbones import create_backbone
from backbones.models.presets import preset_name
from backbones.utils.files import read_json, write_json
from backbones.utils.measure import count_gflops, count_parameters, images_per_second
from backbones.utils.runlog import git_commit

from .plan import Job

# (task, key in metrics.json, heading, whether more is better; None = neither)
COLUMNS = [
    ("classification", "top1", "top-1 %", True),
    ("detection", "box_ap", "box AP", True),
    ("detection", "box_ap50", "box AP50", True),
    ("detection", "mask_ap", "mask AP", True),
    ("segmentation", "miou", "mIoU %", True),
    ("backbone", "parameters", "parameters M", None),
    ("backbone", "gflops", "GFLOPs", None),
    ("backbone", "images_per_s", "inference img/s", True),
    ("backbone", "train_images_per_s", "training img/s", True),
    ("classification", "peak_memory_mb", "cls. memory MiB", False),
    ("detection", "peak_memory_mb", "det. memory MiB", False),
    ("segmentation", "peak_memory_mb", "seg. memory MiB", False),
]


def collect(jobs: list[Job], size: str, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Gathers all figures into ``out``/results.json and returns them."""
    families = list(dict.fromkeys(job.family for job in jobs))
    rows = {family: {"backbone": _measured(family, size, out)} for family in families}
    for job in jobs:
        rows[job.family][job.task] = read_json(job.folder / "metrics.json", "metrics")
    first = {job.task: job for job in reversed(jobs)}
    classes = read_json(first["classification"].folder / "run.json", "run")["data_protocol"]["classes"]
    results = {
        "settings": settings,
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "baselines": {
            "top1_chance": 100 / len(classes),
            "miou_most_frequent_class": rows[families[0]]["segmentation"]["miou_most_frequent_class"],
        },
        "backbones": rows,
    }
    write_json(out / "results.json", results)
    return results


def value(row: dict[str, Any], task: str, key: str) -> float | None:
    """One figure of a row in the table's unit; None when the run gave none."""
    number = row.get(task, {}).get(key)
    if number is None:
        return None
    return number / 1e6 if key == "parameters" else float(number)


def _measured(family: str, size: str, out: Path) -> dict[str, float]:
    """Size and speed of the bare backbone, one after another in this process, so that no other run disturbs them."""
    path = out / family / "speed.json"
    if path.is_file():
        return read_json(path, "speed")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = create_backbone(preset_name(family, size), num_classes=10).to(device)
    batch = 32
    images = torch.randn(batch, 3, *network.config.img_size, device=device)

    def step() -> None:
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            network(images).logsumexp(1).mean().backward()

    figures = {
        "parameters": count_parameters(network),
        "gflops": count_gflops(lambda: network(images[:1])),
        "train_images_per_s": images_per_second(step, batch),
    }
    network.eval()
    figures["images_per_s"] = images_per_second(lambda: network(images), batch)
    write_json(path, figures)
    return figures
