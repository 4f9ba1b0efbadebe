"""Is the sample data what the three tasks read, repeatable, and never written over someone's files?"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from make_sample_data import main, make_sample_data
from PIL import Image
from pycocotools.coco import COCO
from sample_data.objects import OBJECTS as NAMES
from sample_data.relations import HUES, KINDS, RELATIONS, place
from sample_data.scenes import APART, CLASSES, PHOTOGRAPHS, SCENE_SIZE, make_scene

from backbones.utils.errors import UserError

SCENES, OBJECTS = (20, 4), (3, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_sample_data(tmp_path_factory.mktemp("made") / "data", seed=3, scenes=SCENES, objects=OBJECTS)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_files(made, tmp_path):
    again = make_sample_data(tmp_path / "again", seed=3, scenes=SCENES, objects=OBJECTS)
    assert digest(again) == digest(made)


def test_another_seed_gives_other_pictures(made, tmp_path):
    other = digest(make_sample_data(tmp_path / "other", seed=4, scenes=(2, 1), objects=(1, 1)))
    same = [name for name, value in other.items() if name.endswith(".jpg") and digest(made).get(name) == value]
    assert same == []


def test_an_image_does_not_depend_on_how_many_are_made(made, tmp_path):
    fewer = digest(make_sample_data(tmp_path / "fewer", seed=3, scenes=(2, 1), objects=(1, 1)))
    assert all(digest(made)[name] == value for name, value in fewer.items() if name.endswith((".jpg", ".png")))


def test_training_and_validation_share_no_photograph():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])


@pytest.mark.parametrize(("split", "count"), [("train", OBJECTS[0]), ("val", OBJECTS[1])])
def test_classification_has_one_folder_per_class(made, split, count):
    folders = {p.name: len(list(p.glob("*.jpg"))) for p in (made / "classification" / split).iterdir()}
    assert folders == dict.fromkeys(NAMES, count) | dict.fromkeys(RELATIONS, count * len(KINDS))


@pytest.fixture(scope="module")
def coco(made) -> COCO:
    return COCO(str(made / "detection/annotations/train.json"))


def test_coco_json_has_polygons_both_kinds_of_rle_and_crowds(coco):
    kinds = Counter()
    for annotation in coco.anns.values():
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            kind = "polygon"
        else:
            kind = "compressed" if isinstance(segmentation["counts"], str) else "uncompressed"
        kinds[kind] += 1
        kinds["crowd"] += annotation["iscrowd"]
        assert not (annotation["iscrowd"] and kind == "polygon")
    assert min(kinds[k] for k in ("polygon", "compressed", "uncompressed", "crowd")) > 0
    assert kinds["polygon"] > kinds["compressed"] + kinds["uncompressed"]


def test_coco_categories_are_not_contiguous(coco):
    ids = sorted(coco.cats)
    assert len(ids) == len(CLASSES)
    assert ids != list(range(ids[0], ids[0] + len(ids)))


def test_box_and_area_agree_with_the_decoded_mask(coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
        assert np.abs(np.subtract(box, annotation["bbox"])).max() <= 1
        assert abs(mask.sum() - annotation["area"]) <= 0.12 * annotation["area"] + 6


def test_segmentation_mask_agrees_with_the_instances(made, coco):
    agreeing = labelled = 0
    label_of = {i: k for k, i in enumerate(sorted(coco.cats))}
    for image in coco.imgs.values():
        values = np.array(
            Image.open(made / "segmentation/annotations/training" / image["file_name"].replace("jpg", "png"))
        )
        assert values.dtype == np.uint8
        assert values.max() <= 1 + len(CLASSES)
        for annotation in coco.imgToAnns[image["id"]]:
            inside = values[coco.annToMask(annotation).astype(bool)]
            inside = inside[inside > 0]
            agreeing += (inside == 2 + label_of[annotation["category_id"]]).sum()
            labelled += len(inside)
    assert agreeing > 0.98 * labelled


def test_segmentation_has_unlabelled_borders_and_background(made):
    values = np.array(Image.open(made / "segmentation/annotations/training/train_00000.png"))
    assert 0 < (values == 0).mean() < 0.3
    assert (values == 1).mean() > 0.3
    assert json.loads((made / "segmentation/classes.json").read_text()) == ["background", *CLASSES]


def test_detection_and_segmentation_show_the_same_scenes(made):
    a = (made / "detection/val/val_00001.jpg").read_bytes()
    assert a == (made / "segmentation/images/validation/val_00001.jpg").read_bytes()


def test_a_second_call_does_nothing(made, capsys):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    make_sample_data(made, seed=3, scenes=SCENES, objects=OBJECTS)
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before
    assert "already" in capsys.readouterr().out


def test_a_damaged_data_set_is_made_again(tmp_path):
    out = make_sample_data(tmp_path / "d", scenes=(1, 1), objects=(1, 1))
    lost = out / "detection/val/val_00000.jpg"
    lost.unlink()
    make_sample_data(out, scenes=(1, 1), objects=(1, 1))
    assert lost.exists()


def test_other_settings_replace_the_data(tmp_path):
    out = make_sample_data(tmp_path / "d", scenes=(1, 1), objects=(1, 1))
    make_sample_data(out, scenes=(2, 1), objects=(1, 1))
    assert len(list((out / "detection/train").iterdir())) == 2


@pytest.mark.parametrize("ours", [False, True])
def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path, ours):
    out = tmp_path / "d"
    if ours:
        make_sample_data(out, scenes=(1, 1), objects=(1, 1))
    out.mkdir(exist_ok=True)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        make_sample_data(out, scenes=(2, 1), objects=(1, 1))
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("make_sample_data.write_scenes", full_disk)
    with pytest.raises(OSError, match="No space"):
        make_sample_data(tmp_path / "d", scenes=(1, 1), objects=(1, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--scenes-val", "0"], ["--objects-train", "-1"], ["--seed", "-1"]])
def test_sizes_below_one_are_refused(tmp_path, arguments):
    with pytest.raises(UserError, match=r"at least 1|0 or more"):
        main(["--out", str(tmp_path / "d"), *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RELATIONS)
def test_targets_of_a_relation_look_alike_and_lie_farther_from_their_cue_than_a_window(kind, name):
    for seed in range(20):
        parts = place(kind, name, SCENE_SIZE, 11.0, APART, np.random.default_rng(seed))
        targets = [part for part in parts if part.is_target]
        cue = parts[len(targets)]
        assert len(targets) == KINDS[kind].count
        centres = [np.array([p.drawn.column, p.drawn.row]) + len(p.drawn.opacity) / 2 for p in (*targets, cue)]
        assert all(np.linalg.norm(centre - centres[-1]) > 64 for centre in centres[:-1])
        assert all(np.ptp(part.drawn.colour[part.drawn.opacity > 0.5], axis=-1).max() == 0 for part in targets)
        assert colour_name(cue) == name


def colour_name(part):
    """What the colour of a part says, by its hue."""
    red, _, blue = part.drawn.colour[len(part.drawn.opacity) // 2, len(part.drawn.opacity) // 2]
    return "warm" if red > blue else "cold"


def test_a_target_s_name_cannot_be_told_from_its_own_pixels():
    """The same numbers, drawn with either name, differ in the colour of the cue alone."""
    for kind in KINDS:
        warm, cold = (place(kind, name, SCENE_SIZE, 11.0, APART, np.random.default_rng(5)) for name in HUES)
        count = KINDS[kind].count
        for a, b in zip(warm[:count], cold[:count], strict=True):
            assert np.array_equal(a.drawn.colour, b.drawn.colour)
            assert np.array_equal(a.drawn.opacity, b.drawn.opacity)
        assert not np.array_equal(warm[count].drawn.colour, cold[count].drawn.colour)


def test_cues_and_decoys_are_drawn_have_no_name_and_share_no_scene_with_objects():
    scenes = [make_scene("train", np.random.default_rng(seed)) for seed in range(60)]
    relations = [scene for scene in scenes if any(i.label is None for i in scene.instances)]
    assert 20 <= len(relations) <= 40  # half of them
    for scene in relations:
        names = {CLASSES[i.label] for i in scene.instances if i.label is not None}
        assert len(names) == 1
        assert names <= set(RELATIONS)
        assert all(instance.mask.any() for instance in scene.instances)
    others = [i for scene in scenes if all(i.label is not None for i in scene.instances) for i in scene.instances]
    assert {CLASSES[i.label] for i in others} == set(NAMES)


def test_both_names_and_all_kinds_are_about_equally_frequent(coco):
    names = Counter(coco.cats[a["category_id"]]["name"] for a in coco.anns.values())
    assert min(names[name] for name in RELATIONS) > 0.2 * sum(names[name] for name in RELATIONS)
