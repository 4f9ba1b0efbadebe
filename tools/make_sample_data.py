"""Makes the data of the demo and the tests: drawn objects on real photographs, written for all three tasks.

    python tools/make_sample_data.py --out sample_data

Eight classes of objects with their own shape, texture and range of hues, at random scale, rotation, light and
occlusion, and two of relations, white shapes of four kinds that look alike and are named by something far away; on
crops of photographs that come with scikit-image. The same seed gives the same files. About 20 seconds and 25 MB.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

from sample_data.layouts import CATEGORY_IDS, SEGMENTATION_CLASSES, SPLITS, write_classification, write_scenes
from sample_data.relations import RELATIONS
from sample_data.scenes import CLASSES

from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, run_main
from backbones.utils.files import make_folder, write_json

MARKER = "sample_data.json"
FORMAT = 2  # raised when the same settings give other files
FOLDERS = ("classification", "detection", "segmentation")


def make_sample_data(
    out: str | Path, seed: int = 0, scenes: tuple[int, int] = (400, 80), objects: tuple[int, int] = (120, 40)
) -> Path:
    """Writes the three data sets into ``out``, whole or not at all; does nothing when they are there already.

    Args:
        out: folder to make; an existing one must be empty or made by this function.
        seed: 0 or more.
        scenes: training and validation images for detection and segmentation.
        objects: training and validation images for classification, of each class of objects and of each kind of a
            relation.
    Raises:
        UserError: a size below 1, or a folder holding anything else.
    """
    out = Path(out)
    for name, values in (("scenes", scenes), ("objects", objects)):
        if min(values) < 1:
            raise UserError(f"{name} is {tuple(values)}; training and validation need at least 1 each.")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more.")
    settings = {"format": FORMAT, "seed": seed, "scenes": list(scenes), "objects": list(objects)}
    if _is_complete(out, settings):
        print(f"{out} is there already with these settings")
        return out
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for split, scene_count, object_count in zip(SPLITS, scenes, objects, strict=True):
            write_classification(temporary / "classification", split, seed, object_count)
            write_scenes(temporary, split, seed, scene_count)
        marker = {"settings": settings, "files": _count_files(temporary), "classes": CLASSES}
        marker |= {"category_ids": CATEGORY_IDS, "segmentation_classes": SEGMENTATION_CLASSES}
        marker |= {"groups": {"relations": RELATIONS}}
        write_json(temporary / MARKER, marker)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _is_complete(out: Path, settings: dict) -> bool:
    """Whether ``out`` holds exactly this data set; False when it may be (re)placed; UserError when it is not ours."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file. Choose another folder with --out.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return False
    if MARKER not in names or names - {MARKER, *FOLDERS}:
        raise UserError(
            f"{out} holds other files ({', '.join(sorted(names - set(FOLDERS) - {MARKER})[:3]) or 'no ' + MARKER}) "
            "and would be overwritten. Choose an empty or new folder with --out."
        )
    marker = read_json(out / MARKER, "sample data marker")
    return isinstance(marker, dict) and marker.get("settings") == settings and marker.get("files") == _count_files(out)


def _count_files(folder: Path) -> int:
    return sum(len(files) for name in FOLDERS for _, _, files in os.walk(folder / name))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes-train", type=int, default=400, help="training images, detection and segmentation")
    parser.add_argument("--scenes-val", type=int, default=80)
    parser.add_argument(
        "--objects-train", type=int, default=120, help="classification: per class; four times as many of a relation"
    )
    parser.add_argument("--objects-val", type=int, default=40)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    scenes, objects = (args.scenes_train, args.scenes_val), (args.objects_train, args.objects_val)
    out = make_sample_data(args.out, args.seed, scenes, objects)
    sizes = f"{scenes[0]} + {scenes[1]} scenes, {objects[0]} + {objects[1]} objects per class"
    print(f"{out}: {len(CLASSES)} classes; {sizes} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    run_main(main)
