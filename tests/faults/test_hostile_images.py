"""Image files of strangers: nothing waits on a pipe, decodes a giant or ends in a decoder's own error, in any task."""

import copy
import os
import random
import socket
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hostile import FORMATS, image_bytes, large_png, mutated, refused, tar_of
from PIL import Image

from backbones.training.images import UnreadableImageError, read_image
from backbones.training.skips import SkipCounter
from backbones.utils.errors import UserError


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def bytes_of(data):
    return lambda path: path.write_bytes(data)


def icon_of(picture):
    """An icon whose directory promises 16x16 pixels and whose image is ``picture``."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


FILES = {
    "pipe": (fifo, "a pipe, socket or device"),
    "socket": (unix_socket, ""),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "missing": (lambda path: None, "No such file"),
    "dangling": (lambda path: path.symlink_to("none"), "No such file"),
    "loop": (lambda path: path.symlink_to(path), ""),
    "empty": (bytes_of(b""), "cannot identify"),
    "text": (bytes_of(b"<html>" * 99), "cannot identify"),
    "cut": (bytes_of(image_bytes("JPEG")[:300]), ""),
    "giant": (bytes_of(large_png(60000, 60000)), "raise data.max_pixels"),
    "wide": (bytes_of(large_png(2**31 - 1, 1)), "raise data.max_pixels"),
    "somewhat_large": (bytes_of(large_png(20000, 14000)), "raise data.max_pixels"),
    "hollow": (bytes_of(large_png(100, 100)), ""),
    "narrow": (bytes_of(image_bytes(size=(1, 600))), "too narrow"),
    "no_pixels": (bytes_of(large_png(0, 5)), ""),
    "icon_of_a_giant": (bytes_of(icon_of(large_png(60000, 60000))), ""),
    "postscript": (
        bytes_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(MARK) (w) file\n"),
        "identify",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_file_is_unreadable_in_every_task(kind, tmp_path, monkeypatch):
    from segmentation.transforms import LoadCheckedImage, read_mask

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.png"
    put, message = FILES[kind]
    put(path)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, np.array, setting="data.max_pixels")
    assert message in str(caught.value)
    for read in (
        lambda: LoadCheckedImage().transform({"img_path": str(path)}),
        lambda: read_mask(str(path), 3),
        lambda: detection_mapper()({"file_name": str(path)}),
    ):
        with pytest.raises(UnreadableImageError):
            read()


def detection_mapper(size=64):
    from detection.config import get_config
    from detection.loader import inference_mapper

    cfg = get_config()
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = size
    return inference_mapper(cfg)


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_raise_one_error(kind, tmp_path, recwarn):
    from segmentation.transforms import LoadCheckedImage

    raw, path, unreadable = image_bytes(kind), tmp_path / "x", 0
    if raw is None:
        pytest.skip(f"this PIL writes no {kind}")
    detection, segmentation = detection_mapper(), LoadCheckedImage(max_pixels=10**6)
    for seed in range(40):
        path.write_bytes(mutated(raw, seed))
        for read in (
            lambda: read_image(path, lambda image: image.convert("RGB"), 10**6),
            lambda: detection({"file_name": str(path)}),
            lambda: segmentation.transform({"img_path": str(path)}),
        ):
            try:
                read()
            except UnreadableImageError:
                unreadable += 1
    assert unreadable > 0


def test_limit_of_pixels_is_exact_and_a_setting(tmp_path):
    (tmp_path / "x.png").write_bytes(image_bytes(size=(10, 10)))
    assert read_image(tmp_path / "x.png", np.array, 100).shape == (10, 10, 3)
    with pytest.raises(UnreadableImageError, match=r"10x10 are more than 99 pixels; raise INPUT\.MAX_PIXELS"):
        read_image(tmp_path / "x.png", np.array, 99, "INPUT.MAX_PIXELS")


@pytest.mark.parametrize(
    "error",
    [
        struct.error,
        ValueError,
        IndexError,
        ZeroDivisionError,
        OverflowError,
        MemoryError,
        SyntaxError,
        AttributeError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        AssertionError,
    ],
)
def test_whatever_a_decoder_raises_is_one_error(error, tmp_path):
    (tmp_path / "x.png").write_bytes(image_bytes())

    def fail(image):
        raise error("odd \x1b[31m bytes")

    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / "x.png", fail)
    assert "\x1b" not in str(caught.value) and "odd" in str(caught.value)


def pictures():
    """Images of every mode and turn that the readers treat in their own ways."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 255, (20, 30, 4), dtype=np.uint8))
    for mode in ("RGB", "L", "P", "1", "CMYK"):
        yield f"{mode}.tiff" if mode == "CMYK" else f"{mode}.png", colour.convert(mode), {}
    yield "RGBA.png", alpha, {}
    yield "LA.png", alpha.convert("LA"), {}
    yield "I16.png", Image.fromarray(rng.integers(0, 65535, (20, 30), dtype=np.uint16)), {}
    yield "jpeg.jpg", colour, {}
    for turn in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned{turn}.jpg", colour, {"exif": exif}


def test_pixels_are_those_of_each_frameworks_own_reader(tmp_path):
    import mmcv
    from detectron2.data.detection_utils import read_image as detectron2_reads

    from segmentation.transforms import LoadCheckedImage

    for name, picture, options in pictures():
        path = tmp_path / name
        picture.save(path, **options)
        with Image.open(path) as image:
            plain, raw = image.convert("RGB"), np.array(image)
        assert np.array_equal(read_image(path, lambda image: image.convert("RGB")), plain)
        assert np.array_equal(read_image(path, np.array), raw)
        if name != "I16.png":
            mapper = detection_mapper()
            assert np.array_equal(read_image(path, mapper._decode), detectron2_reads(str(path), "RGB"))
            ours = LoadCheckedImage().transform({"img_path": str(path)})["img"]
            assert np.array_equal(ours, mmcv.imfrombytes(path.read_bytes(), backend="pillow"))


def test_mapper_makes_what_detectron2s_makes(sample_data):
    import torch
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets import load_coco_json

    from detection.config import get_config
    from detection.loader import training_mapper

    cfg = get_config()
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MASK_FORMAT = 64, "bitmask"
    folder = sample_data / "detection"
    ours, size = training_mapper(cfg), 64
    steps = [
        T.RandomFlip(horizontal=True, vertical=False),
        T.ResizeScale(0.1, 2.0, size, size),
        T.FixedSizeCrop((size, size), False),
    ]
    theirs = DatasetMapper(
        is_train=True,
        augmentations=steps,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    for record in load_coco_json(str(folder / "annotations/train.json"), str(folder / "train"))[:4]:
        made = []
        for mapper in (ours, theirs):
            np.random.seed(0)
            made.append(mapper(copy.deepcopy(record)))
        assert torch.equal(made[0]["image"], made[1]["image"])
        assert torch.equal(made[0]["instances"].gt_boxes.tensor, made[1]["instances"].gt_boxes.tensor)
        assert torch.equal(made[0]["instances"].gt_masks.tensor, made[1]["instances"].gt_masks.tensor)


@pytest.fixture
def class_folder(tmp_path):
    """Two classes of five images, as train/ and val/."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(5):
                (tmp_path / split / name / f"{number}.png").write_bytes(image_bytes())
    return tmp_path


@pytest.mark.parametrize("kind", ["pipe", "cut", "giant", "text"])
def test_classification_skips_in_training_and_names_in_evaluation(kind, class_folder, capsys):
    from classification.data import Images, open_split

    bad = class_folder / "train/cat/2\x1b[31m.png"
    FILES[kind][0](bad)
    source = open_split(str(class_folder), "", ("train",))
    skips = SkipCounter(len(source))
    training, evaluation = Images(source, 0, skips), Images(source, 0)
    training.transform = evaluation.transform = np.array
    assert len([training[i] for i in range(len(source))]) == 11 and skips.count == 1
    assert "\x1b" not in capsys.readouterr().err
    with refused("cannot read the image"):
        [evaluation[i] for i in range(len(source))]


@pytest.mark.parametrize("links", [["."], ["..", "."], ["cat", "../dog"]], ids=str)
def test_class_folders_that_links_lead_into_again(links, class_folder):
    from classification.data import open_split

    for number, link in enumerate(links):
        (class_folder / "train/cat" / f"again{number}").symlink_to(class_folder / "train" / link)
    with refused("leads back into itself") if links[0] != "cat" else refused():
        open_split(str(class_folder), "", ("train",))


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\rb", "\u202ecod", "caf\udce9", "a\nb", "x" * 255], ids=ascii)
def test_class_names_that_control_a_terminal(name, class_folder):
    from classification.data import open_split

    try:
        (class_folder / "train/cat").rename(class_folder / "train" / name)
    except OSError:
        pytest.skip("this file system has no such name")
    if len(name) == 255:
        assert name in open_split(str(class_folder), "", ("train",)).classes
        return
    with refused("without control characters"):
        open_split(str(class_folder), "", ("train",))


def test_linked_class_folders_stay_allowed(class_folder, tmp_path):
    from classification.data import open_split

    (class_folder / "train/dog").rename(tmp_path / "elsewhere")
    (class_folder / "train/dog").symlink_to(tmp_path / "elsewhere")
    assert open_split(str(class_folder), "", ("train",)).classes == ["cat", "dog"]


PICTURE = image_bytes()
GOOD = tar_of([("cat/1.png", tarfile.REGTYPE, PICTURE), ("dog/1.png", tarfile.REGTYPE, PICTURE)])
HEADER = bytearray(GOOD)
HEADER[124:136] = b"\xff" * 10 + (-1536 & 0xFFFF).to_bytes(2, "big")
HEADER[148:156] = b"%06o\0 " % (sum(HEADER[:148]) + sum(HEADER[156:512]) + 256)
TARS = {
    "link": (tar_of([("cat/1.png", tarfile.SYMTYPE, b"")]), "a link"),
    "hard_link": (tar_of([("cat/1.png", tarfile.LNKTYPE, b"")]), "a link"),
    "pipe": (tar_of([("cat/1.png", tarfile.FIFOTYPE, b"")]), "no plain file"),
    "device": (tar_of([("cat/1.png", tarfile.CHRTYPE, b"")]), "no plain file"),
    "above": (tar_of([("../cat/1.png", tarfile.REGTYPE, PICTURE)]), "outside of itself"),
    "within": (tar_of([("cat/../../1.png", tarfile.REGTYPE, PICTURE)]), "outside of itself"),
    "absolute": (tar_of([("/etc/1.png", tarfile.REGTYPE, PICTURE)]), "outside of itself"),
    "control": (tar_of([("\x1b[31m/1.png", tarfile.REGTYPE, PICTURE)]), "without control characters"),
    "negative_size": (bytes(HEADER), "cannot read"),
    "cut": (GOOD[:300], "cannot read"),
    "empty": (b"", "cannot read"),
    "zeros": (b"\0" * 10240, ""),
    "text": (b"no tar" * 999, "cannot read"),
    "no_images": (tar_of([("cat/1.txt", tarfile.REGTYPE, b"x")]), ""),
    "tar_in_tar": (tar_of([("a.tar", tarfile.REGTYPE, b"x" * 2000)]), "cannot read"),
}


@pytest.mark.parametrize("kind", TARS)
def test_tar(kind, tmp_path):
    from classification.data import open_split

    data, message = TARS[kind]
    (tmp_path / "train.tar").write_bytes(data)
    with refused(message):
        open_split(str(tmp_path), "", ("train",))


def test_mutated_tars_are_read_or_refused(tmp_path):
    from classification.data import Images, open_split

    rng = random.Random(0)
    for seed in range(60):
        data = bytearray(GOOD)
        for _ in range(4):
            data[rng.choice((0, 2048)) % len(GOOD) + rng.randrange(512)] = rng.randrange(256)
        (tmp_path / "train.tar").write_bytes(mutated(data, seed) if seed % 3 else data)
        try:
            source = open_split(str(tmp_path), "", ("train",))
            images = Images(source, 0)
            images.transform = np.array
            [images[i] for i in range(len(source))]
        except UserError:
            continue


def test_a_folder_or_pipe_called_tar_is_no_tar(tmp_path):
    from classification.data import open_split

    (tmp_path / "train.tar").mkdir()
    os.mkfifo(tmp_path / "val.tar")
    for name in ("train", "val"):
        with refused("has no folder or .tar"):
            open_split(str(tmp_path), "", (name,))


CLASSES = [
    "[]",
    "{}",
    "[1]",
    '["a", "a"]',
    '[""]',
    '["\\u001b[31m"]',
    '["\\ud800"]',
    "[null]",
    f'["{"x" * 300}"]',
    "[NaN]",
    "[" * 9999,
    '["a"',
    '["a\\u0000b"]',
    str(list(range(300))),
    '["\\u202ex"]',
    '{"a": 1, "a": 2}',
]


@pytest.mark.parametrize("text", CLASSES, ids=lambda text: text[:16])
def test_classes_of_segmentation(text, tmp_path):
    from segmentation.datasets import class_metainfo

    (tmp_path / "classes.json").write_text(text)
    with refused():
        class_metainfo(tmp_path)


@pytest.mark.parametrize("kind", ["colour", "fraction", "value", "negative", "infinite"])
def test_masks(kind, tmp_path):
    from segmentation.transforms import read_mask

    values = {
        "value": np.uint8(200),
        "negative": np.int32(-5),
        "fraction": np.float32(0.5),
        "infinite": np.float32(np.inf),
    }
    array = np.zeros((4, 4, 3), np.uint8) if kind == "colour" else np.full((4, 4), values[kind])
    Image.fromarray(array).save(tmp_path / "x.tiff")
    with refused("the mask"):
        read_mask(str(tmp_path / "x.tiff"), 3)
