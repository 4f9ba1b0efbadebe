"""Speed and memory of each row's bare backbone, measured alone on the machine, twice, in turns.

Each measurement has a process of its own, whose memory no other network took and freed before.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plan import ROOT
from .rows import Row

BATCH = 32
ROUNDS = 2
_SEED = 0


def measure_rows(rows: Sequence[Row], size: str, path: Path) -> dict[str, dict[str, list[float | None]]]:
    """Measures the rows that ``path`` lacks, each ``ROUNDS`` times in turns, and adds them to it; returns all of it.

    Returns:
        By row: images_per_s, train_images_per_s and memory_mib, the growth of memory beyond the weights in a training
        step of BATCH images (None where this system cannot tell), each with ROUNDS values. A row whose measurement
        failed, for want of memory for example, is left out, and measured again by the next call.
    """
    from backbones.utils.documents import read_json
    from backbones.utils.files import write_json

    known = read_json(path, "speed") if path.is_file() else {}
    missing = [row for row in rows if row.name not in known]
    found: dict[str, dict[str, list[float | None]]] = {row.name: {} for row in missing}
    for turn in range(ROUNDS):
        for row in missing if turn % 2 == 0 else missing[::-1]:
            for name, value in _measure_apart(row, size).items():
                found[row.name].setdefault(name, []).append(value)
    complete = {
        name: values for name, values in found.items() if values and len(min(values.values(), key=len)) == ROUNDS
    }
    if complete:
        write_json(path, known | complete)
    return {row.name: (known | complete)[row.name] for row in rows if row.name in known | complete}


def _measure_apart(row: Row, size: str) -> dict[str, float | None]:
    """The figures of one measurement; {} with a line on the terminal when it failed."""
    config = json.dumps(row.backbone(size).to_dict())
    command = [sys.executable, "-c", "from suite.speed import measure; measure()"]
    done = subprocess.run(command, input=config, capture_output=True, text=True, check=False, cwd=ROOT / "tools")
    if done.returncode:
        print(f"[failed] speed of {row.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure() -> None:
    """Prints the figures of the backbone whose config comes on standard input."""
    import torch

    from backbones import BackboneConfig, create_backbone
    from backbones.training.measure import images_per_second
    from bench.timing import peak_mib

    config: dict[str, Any] = json.load(sys.stdin)
    torch.manual_seed(_SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = create_backbone(BackboneConfig.from_dict(config), num_classes=10, weights=None).to(device)
    images = torch.randn(BATCH, 3, *network.config.img_size, device=device)

    def step() -> None:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            network(images).logsumexp(1).mean().backward()

    step()  # what is made once, such as kernels and gradients, is not of the step
    figures = {"memory_mib": peak_mib(step, device), "train_images_per_s": images_per_second(step, BATCH)}
    network.eval()
    figures["images_per_s"] = images_per_second(lambda: network(images), BATCH)
    print(json.dumps(figures))
