"""The report: what stands in its cells, which pictures it makes, and that its page needs nothing but itself."""

import colorsys
import copy
import itertools
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image, ImageDraw

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.models.presets import preset_name
from backbones.training.monitor import OperatorMonitor
from report.drawing import class_color, literal, write_label
from report.examples import example_sections, first_done, most_classes
from report.figures import curves, mean_and_band, sweeps
from report.functions import function_panels, learned_functions
from report.notes import notes, warnings
from report.operators import operator_table
from report.page import markdown_table, print_table, write_report
from report.table import make_table

COLUMNS = [
    ("classification.top1", "top-1 %", None, True),
    ("classification.top1@relations", "top-1 %, relations", "relations", False),
    ("detection.box_ap50", "box AP50", None, True),
    ("detection.mask_ap", "mask AP", None, False),
    ("segmentation.miou", "mIoU %", None, True),
]
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Run:
    """What the report reads of a job."""

    row: str
    task: str
    seed: int
    folder: Path

    def is_done(self) -> bool:
        return (self.folder / "metrics.json").is_file()


def make_results(*names, controls=(), seeds=(0, 1, 2), tasks=("classification", "detection", "segmentation")):
    """Results whose figures are 10 × (row + 1) + column + seed."""
    columns = [
        {"name": name, "task": name.split(".")[0], "heading": heading, "group": group, "better": "max", "main": main}
        for name, heading, group, main in COLUMNS
        if name.split(".")[0] in tasks
    ]
    rows = {}
    for place, name in enumerate((*names, *controls)):
        figures = {}
        for index, column in enumerate(columns):
            values = {str(seed): 10.0 * (place + 1) + index + seed for seed in seeds}
            mean = sum(values.values()) / len(values)
            figures[column["name"]] = {"mean": mean, "std": 1.0 if len(seeds) > 1 else None, "by_seed": values}
        rows[name] = {
            "family": "vit",
            "control": "attention" if name in controls else None,
            "settings": {},
            "task_settings": {},
            "pretraining": name,
            "variant": name,
            "sweep": None,
            "parameters": 697000,
            "gflops": 0.049,
            "figures": figures,
            "failures": {},
        }
    return {
        "settings": {"size": "nano", "data": "sample", "quick": False, "tasks": list(tasks), "seeds": list(seeds)},
        "git_commit": "abcdef0123456789",
        "torch": "2.11.0",
        "device": "CPU, 2 threads",
        "commits": ["abcdef0123456789"],
        "columns": columns,
        "rows": rows,
        "best": {column["name"]: {"row": names[-1], "clear": True} for column in columns},
        "controls": {},
        "baselines": {"classification.top1": 12.5},
    }


def cells(results, name, speed=None):
    """Heading: cell, of one line of the table."""
    table = make_table(results, speed or {})
    line = next(line for line in (*table.rows, *table.controls, *table.references) if line.name == name)
    return dict(zip([column.heading for column in table.columns], line.cells, strict=True))


def test_a_cell_is_the_mean_and_the_spread_over_seeds():
    results = make_results("vit", "kat")
    assert cells(results, "vit")["top-1 %"].text == "11.0 ± 1.0"
    assert cells(results, "to beat")["top-1 %"].text == "12.5"
    assert cells(results, "to beat")["mIoU %"].text == ""
    assert cells(results, "vit")["parameters M"].text == "0.697"


def test_only_a_clear_best_is_bold():
    results = make_results("vit", "kat")
    results["best"]["detection.box_ap50"]["clear"] = False
    del results["best"]["detection.mask_ap"]
    bold = [heading for heading, cell in cells(results, "kat").items() if cell.bold]
    assert bold == ["top-1 %", "top-1 %, relations", "mIoU %"]
    assert not any(cell.bold for cell in cells(results, "vit").values())
    assert "| kat | **21.0 ± 1.0** | **22.0 ± 1.0** | 23.0 ± 1.0 | 24.0 ± 1.0 |" in markdown_table(results, {})


def test_one_seed_is_bold_nowhere_and_says_so():
    results = make_results("vit", "kat", seeds=(0,))
    assert cells(results, "kat")["top-1 %"].text == "20.0"
    assert "**" not in markdown_table(results, {})
    assert any("--seeds 3" in line for line in warnings(results))
    assert not any("Bold" in line for line in notes(results))
    assert any("over seeds 0, 1, 2." in line for line in notes(make_results("vit", "kat")))


def test_a_failed_run_is_told_from_one_that_was_not_asked_for():
    results = make_results("vit", "kat")
    for name in ("detection.box_ap50", "detection.mask_ap", "segmentation.miou"):
        del results["rows"]["vit"]["figures"][name]
    results["rows"]["vit"]["failures"] = {"detection": {"0": "error", "1": "error", "2": "error"}}
    figure = results["rows"]["vit"]["figures"]["classification.top1"]
    figure["by_seed"].pop("2")
    shown = cells(results, "vit")
    assert [shown[h].text for h in ("box AP50", "mask AP", "mIoU %")] == ["failed", "failed", "–"]
    assert shown["top-1 %"].text == "11.0 ± 1.0 (2 seeds)"
    assert any("failed: 3" in line for line in warnings(results))


def test_several_commits_and_a_quick_run_are_warned_of():
    results = make_results("vit", "kat")
    assert warnings(results) == []
    results["commits"].append("0123456789abcdef")
    results["settings"]["quick"] = True
    assert [line.split()[0] for line in warnings(results)] == ["A", "The"]


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        ([1000.0, 1100.0], "1050"),
        ([100.0, 120.0], "110"),  # 20 % is still steady
        ([134.0, 100.0], "unsteady (+34 %)"),
        ([55.5], "55.50"),
        ([None, 310.0], "–"),
        ([], "–"),
    ],
)
def test_a_speed_is_the_mean_of_two_steady_measurements(measured, text):
    results = make_results("vit", "kat")
    assert cells(results, "vit", {"vit": {"images_per_s": measured}})["inference img/s"].text == text
    assert cells(results, "kat", {"vit": {"images_per_s": measured}})["inference img/s"].text == "–"


def test_controls_come_last_and_say_what_a_column_does_not_measure():
    results = make_results("vit", "kat", controls=("uniform",))
    results["controls"] = {
        "classification.top1": {"attention": {"row": "uniform", "share": 0.983, "within_spread": True}},
        "detection.box_ap50": {"attention": {"row": "uniform", "share": 0.5, "within_spread": False}},
        "segmentation.miou": {"ffn": {"row": "uniform", "share": 0.7, "within_spread": None}},
    }
    table = make_table(results, {})
    assert [line.name for line in table.controls] == ["uniform"]
    attention = cells(results, "best control of attention / best")
    assert attention["top-1 %"].text == "98 % (uniform): does not measure attention here"
    assert attention["box AP50"].text == "50 % (uniform)"
    assert attention["mIoU %"].text == ""
    assert cells(results, "best control of feed-forward / best")["mIoU %"].text == "70 % (uniform)"
    lines = markdown_table(results, {}).splitlines()
    names = [line.removeprefix("| ").split(" | ")[0] for line in lines[4:]]
    assert names[:3] == ["uniform (control)", "to beat", "best control of attention / best"]


def test_names_appear_literally_on_the_terminal_in_markdown_and_in_plots(capsys):
    results = make_results("[red]x", "<b>", "a$x_1$")
    print_table(results, {})
    shown = capsys.readouterr().out
    assert all(name in shown for name in results["rows"])
    text = markdown_table(results, {})
    assert r"| \[red\]x |" in text
    assert r"| \<b\> |" in text
    assert r"| a\$x_1\$ |" in text
    assert cbook.is_math_text("a$x_1$")
    assert not cbook.is_math_text(literal("a$x_1$"))


def write_log(folder, points, done=True):
    """A run's folder with these validation figures by epoch."""
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "epoch": epoch, "split": split, "name": name, "value": value}
        for epoch, value in points
        for split, name in (("train", "loss"), ("val", "top1"))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (folder / "metrics.json").write_text("{}")


def test_a_band_spans_the_epochs_that_all_seeds_reached():
    band = mean_and_band([[(1, 2.0), (2, 4.0), (3, 9.0)], [(1, 4.0), (2, 8.0)]])
    assert band == [(1, 3.0, 2.0, 4.0), (2, 6.0, 4.0, 8.0)]


def test_curves_leave_out_what_was_never_logged(tmp_path, monkeypatch):
    jobs = [Run("a$x_1$", "classification", seed, tmp_path / f"a{seed}") for seed in (0, 1)]
    jobs.append(Run("stopped", "classification", 0, tmp_path / "stopped"))
    jobs.append(Run("absent", "classification", 0, tmp_path / "absent"))
    write_log(jobs[0].folder, [(1, 10.0), (2, 20.0)])
    write_log(jobs[1].folder, [(1, 14.0), (2, float("nan"))])
    write_log(jobs[2].folder, [(1, 5.0)], done=False)
    drawn, labels = [], []
    monkeypatch.setattr(matplotlib.figure.Figure, "legend", lambda self, handles, names, **_: labels.append(names))
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *data, **style: drawn.append(data) or plot(self, *data, **style)
    )
    plots = curves(jobs, "classification")
    assert [plot.name for plot in plots] == ["classification_loss", "classification_validation"]
    assert all(plot.picture.startswith(PNG) for plot in plots)
    assert drawn == 2 * [((1,), (12.0,)), ((1,), (5.0,))]
    assert labels == 2 * [[r"a\$x_1\$", "stopped"]]
    assert curves(jobs, "detection") == []


def add_sweep(results, **settings):
    """Rows of one variant in place of all others: the product of two settings, or one."""
    base = results["rows"].pop("vit")
    for rank in (4, 12):
        for basis in settings.get("bases", (None,)):
            row = copy.deepcopy(base)
            sweep = {"attention.rank": [rank, rank]} | ({"attention.basis": basis} if basis else {})
            results["rows"][f"rank={rank},{basis}"] = row | {"variant": "of rank", "sweep": sweep, "settings": sweep}


@pytest.mark.parametrize("bases", [(None,), ("fourier", "bspline")], ids=["one setting", "two settings"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one seed", "three seeds"])
def test_a_sweep_is_drawn_for_main_and_relations_columns(bases, seeds):
    results = make_results("vit", "kat", seeds=seeds, tasks=("classification", "detection"))
    assert sweeps(results) == []
    add_sweep(results, bases=bases)
    next(iter(results["rows"].values()))["figures"].clear()  # a row whose runs failed
    for row in results["rows"].values():
        row["figures"].pop("detection.box_ap50", None)
    plots = sweeps(results)
    assert [plot.name for plot in plots] == [
        "sweep_of_rank_classification.top1",
        "sweep_of_rank_classification.top1@relations",
    ]
    assert all(plot.picture.startswith(PNG) for plot in plots)


def save_classifier(folder, family="vit", classes=("disc", "ring"), gates=None, **fields):
    """Weights of a small network, whose gates by block are ``gates``."""
    network = create_backbone(preset_name(family, "nano"), num_classes=len(classes), **fields)
    for name, values in (gates or {}).items():
        network.get_parameter(f"{name}.attn.gate").data = torch.tensor(values)
    save_backbone(
        folder / "model.safetensors", network, classes=list(classes), mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]
    )
    return network


def test_learned_functions_are_those_of_the_networks_that_have_any(tmp_path):
    jobs = [Run(family, "classification", 0, tmp_path / family) for family in ("vit", "karat_swin", "kat")]
    for job in jobs:
        job.folder.mkdir()
        save_classifier(job.folder, job.row)
    panels = function_panels(jobs)
    assert [title for title, _ in panels] == [
        *(f"kat blocks.{b}: F2 by group" for b in (0, 3, 5)),
        *(f"karat_swin layers.{s}.blocks.{b}: φ of head 0" for s, b in ((0, 0), (2, 0), (3, 1))),
    ]
    assert learned_functions(panels).startswith(PNG)
    assert function_panels(jobs[:1]) == []
    assert learned_functions([]) is None
    assert {title.split()[0] for title, _ in function_panels(jobs, at_most=1)} == {"karat_swin"}


def operator_run(folder, series, family="gated_karat", **fields):
    """A finished classification run with a classifier whose operators logged these values, every tenth step."""
    write_log(folder, [(1, 10.0), (2, 20.0)])
    with (folder / "metrics.jsonl").open("a") as log:
        for name, values in series.items():
            for i, value in enumerate(values):
                row = {"step": 10 * (i + 1), "epoch": 1.0, "split": "train", "name": name, "value": value}
                log.write(json.dumps(row) + "\n")
    save_classifier(folder, family, **fields)
    return Run(folder.name, "classification", 0, folder)


def logged_of(place, scores, outputs, steps):
    """Series of one operator, among others that the table does not show."""
    shown = {f"{place}/score_max": scores, f"{place}/output": outputs, f"{place}/step": steps}
    return shown | {f"{place}/score_std": [0.5] * 3, f"{place}/gate": [0.9] * 3, "grad_norm/operator.w": [7.0] * 3}


def texts(lines):
    return [[line.name, *(cell.text for cell in line.cells)] for line in lines]


LOGGED = logged_of("blocks.0.attn", [2.0, 9.0, 4.0], [1.5, 1.25, 0.75], [0.5, 0.01, 0.02])
GATED = [
    ["gated", "blocks.0", "4.00", "4.00", "0.750", "2.00", "50.00", "0.125, -0.031"],
    ["gated", "blocks.1", "20.00", "130", "2.50", "0.100", "0.400", "0.000, 1.500"],
]


def gated_run(folder):
    series = LOGGED | logged_of("blocks.1.attn", [20.0, 10.0, 130.0], [0.5, 1.0, 2.5], [0.001, 0.0005, 0.004])
    gates = {"blocks.0": [0.125, -0.03125], "blocks.1": [0.0, 1.5]}
    return operator_run(folder, series, depth=2, attention={"heads": (0, 2)}, gates=gates)


def test_operators_are_shown_by_block_with_median_last_largest_and_gates(tmp_path):
    job = gated_run(tmp_path / "gated")
    lines = operator_table([job])
    assert [(line.score_median, line.score_last, line.output_last) for line in lines] == [
        (4.0, 4.0, 0.75),
        (20.0, 130.0, 2.5),
    ]
    assert [(line.step_median, line.step_largest) for line in lines] == [
        pytest.approx((2.0, 50.0)),
        pytest.approx((0.1, 0.4)),
    ]
    assert [line.gates for line in lines] == [(0.125, -0.03125), (0.0, 1.5)]
    assert texts(lines) == GATED


def test_gates_of_swin_are_found_and_operators_in_place_of_softmax_have_none(tmp_path):
    place = "layers.1.blocks.0"
    log = logged_of(f"{place}.attn", [3.0], [1.0], [0.25])
    swin = operator_run(tmp_path / "swin", log, "gated_karat_swin", gates={place: [0.25] * 4})
    lines = operator_table([swin, operator_run(tmp_path / "karat", LOGGED, "karat", depth=2)])
    shown = {(name, block): rest for name, block, *rest in texts(lines)}
    assert shown["swin", place] == ["3.00", "3.00", "1.00", "25.00", "25.00", "0.250, 0.250, 0.250, 0.250"]
    assert shown["karat", "blocks.0"] == ["4.00", "4.00", "0.750", "2.00", "50.00", ""]
    assert [block for name, block in shown if name == "karat"] == ["blocks.0"]


def words_of_page(jobs, out, monkeypatch):
    """The page of a comparison of these classification runs, and its words, without examples of images."""
    monkeypatch.setattr("report.page.example_sections", lambda jobs, data: [])
    results = make_results(*(job.row for job in jobs), tasks=("classification",), seeds=(0,))
    page = Page(write_report(results, {}, jobs, None, out).read_text(encoding="utf-8"))
    return page, "|".join(word for word in page.words if word)


def test_what_training_logs_of_a_universal_operator_is_one_line_before_the_gates_of_the_blocks(tmp_path, monkeypatch):
    fields = {"depth": 2, "attention": {"mode": "universal"}}
    network = create_backbone(preset_name("gated_karat", "nano"), num_classes=2, **fields)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    monitor = OperatorMonitor(network, network, optimizer)
    monitor.watch()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    values = monitor.values()
    gates = {"blocks.0": [0.5, 0.25, 0.0], "blocks.1": [0.75, 0.5, 0.25]}
    job = operator_run(tmp_path / "shared", {name: [value] for name, value in values.items()}, gates=gates, **fields)
    lines = operator_table([job])
    shared = lines[0]
    assert shared.block == "operator"
    assert shared.score_median == shared.score_last == values["operator/score_max"] > 0
    assert shared.output_last == values["operator/output"] > 0
    assert shared.step_median == shared.step_largest == 100 * values["operator/step"]
    assert texts(lines)[1:] == [
        ["shared", "blocks.0", *"–––––", "0.500, 0.250, 0.000"],
        ["shared", "blocks.1", *"–––––", "0.750, 0.500, 0.250"],
    ]
    _, words = words_of_page([job], tmp_path / "out", monkeypatch)
    assert "The operator that all blocks share" in words
    assert "|".join(word for line in texts(lines) for word in line if word) in words


def test_runs_that_logged_no_operators_are_passed_over(tmp_path):
    without = [operator_run(tmp_path / family, {}, family) for family in ("vit", "gated_karat")]
    without.append(Run("absent", "classification", 0, tmp_path / "absent"))
    assert operator_table(without) == []
    more = [operator_run(tmp_path / f"karat{i}", LOGGED, "karat", depth=1) for i in range(2)]
    assert [line.name for line in operator_table([*without, *more], at_most=1)] == ["karat0"]


@pytest.mark.parametrize("watched", [True, False])
def test_the_page_has_the_operators_below_the_functions_where_a_run_logged_them(tmp_path, monkeypatch, watched):
    vit = operator_run(tmp_path / "vit", {}, "vit")
    karat = gated_run(tmp_path / "gated") if watched else operator_run(tmp_path / "gated", {}, depth=2)
    page, words = words_of_page([vit, karat], tmp_path / "out", monkeypatch)
    assert "gated blocks.0: φ of head 0" in words
    assert ("Change per step is measured on one image" in words) == watched
    assert "all blocks share" not in words
    assert len(page.tables) == (3 if watched else 2)
    assert all("scroll" in ancestors for ancestors in page.tables)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    heads = "row|block|median|last|last|median|largest|last|"
    assert ("|".join(itertools.chain(*GATED)) in words.partition(heads)[2]) == watched


def test_pictures_are_of_the_first_finished_seed(tmp_path):
    jobs = [Run(row, "classification", seed, tmp_path / f"{row}{seed}") for seed in (1, 0) for row in ("vit", "kat")]
    for job in jobs[:3]:
        write_log(job.folder, [])
    assert [(job.row, job.seed) for job in first_done(jobs, "classification")] == [("vit", 0), ("kat", 1)]
    assert first_done(jobs, "detection") == []


class Page(HTMLParser):
    """The elements of a page: their open ancestors, addresses, and the text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tables, self.words, self.tags, self.style = [], [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.addresses += [attributes[key] for key in ("src", "href", "srcset", "action") if key in attributes]
        if tag == "table":
            self.tables.append([cls for _, cls in self.open])
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.style += data
        else:
            self.words.append(data.strip())


@pytest.fixture
def comparison(tmp_path, sample_data, monkeypatch):
    """Results, jobs and data of rows with awkward names; detectors and segmentors that always say the same."""
    import detection.engine
    import segmentation.engine
    import segmentation.state

    names = ["<b>", "a$x_1$", *(f"vit{i}" for i in range(7))]
    results = make_results(*names, controls=("uniform",))
    results["rows"]["<b>"]["failures"] = {"segmentation": {"1": "error: <i>diverged</i> " + "x" * 300}}
    jobs = [
        Run(row, task, seed, tmp_path / "runs" / str(seed) / str(place) / task)
        for task in results["settings"]["tasks"]
        for place, row in enumerate(results["rows"])
        for seed in (0, 1, 2)
    ]
    for job in jobs:
        write_log(job.folder, [(1, 1.0), (2, 3.0)], done=job.row != "vit0")
        if job.task == "classification" and job.seed == 0:
            save_classifier(job.folder, classes=sorted(p.name for p in (sample_data / "classification/val").iterdir()))

    def detect(folder, paths, min_score):
        mask = np.zeros((1, 64, 64), bool)
        found = {"boxes": np.array([[1.0, 2.0, 30.0, 40.0]]), "names": ["ring"], "scores": np.array([0.9])}
        return [found | {"masks": mask} for _ in paths]

    monkeypatch.setattr(detection.engine, "predict", detect)

    def segment(folder, paths):
        return [np.full(Image.open(path).size[::-1], 2, np.uint8) for path in paths]

    monkeypatch.setattr(segmentation.engine, "predict", segment)
    description = (None, {"classes": json.loads((sample_data / "segmentation" / "classes.json").read_text())})
    monkeypatch.setattr(segmentation.state, "load_description", lambda path: description)
    layout = SimpleNamespace(
        classification={"root": str(sample_data / "classification")},
        detection={
            "test_json": str(sample_data / "detection" / "annotations" / "val.json"),
            "test_images": str(sample_data / "detection" / "val"),
        },
        segmentation={"data_root": str(sample_data / "segmentation")},
    )
    return SimpleNamespace(results=results, jobs=jobs, data=layout)


@pytest.mark.slow
def test_the_page_is_whole_in_itself_and_never_wider_than_the_screen(comparison, tmp_path):
    comparison.results["rows"]["vit1"] |= {"variant": "<rank>", "sweep": {"attention.rank": 4}}
    path = write_report(comparison.results, {}, comparison.jobs, comparison.data, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    # Nothing is fetched.
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert not any(tag == "script" for tag, _ in page.tags)
    # Tables scroll in a box of their own; pictures shrink with the page and keep their shape.
    assert page.tables
    assert all("scroll" in ancestors for ancestors in page.tables)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", page.style)
    assert re.search(r"\bpre \{[^}]*overflow: auto", page.style)
    assert re.search(r"\bimg \{[^}]*max-width: 100%;[^}]*height: auto", page.style)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image.get("alt") and not image.keys() & {"width", "height", "style"} for image in images)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    # Names and logs appear letter by letter; only finished rows have pictures, the first eight of them.
    assert page.words.count("<b>") >= 4
    assert page.words.count("a$x_1$") >= 4
    assert any(words.startswith("error: <i>diverged</i>") for words in page.words)
    assert "The first 8 of 9 rows." in text
    assert {path.stem for path in (tmp_path / "out" / "pictures").iterdir()} == {
        *(f"{task}{what}" for task in comparison.results["settings"]["tasks"] for what in ("", "_loss")),
        "classification_validation",
        *(f"sweep_rank_{name}" for name, _, group, main in COLUMNS if main or group),
    }
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == markdown_table(comparison.results, {})


def test_examples_show_the_truth_first_then_each_finished_row(comparison):
    few = [job for job in comparison.jobs if job.row in ("<b>", "vit0", "uniform")]
    classification, detection, segmentation = example_sections(few, comparison.data)
    for example in classification.examples:
        lines = example.panels[0].lines
        assert [line[2:].split(":")[0] for line in lines] == ["<b>", "uniform"]
        assert all((line[0] == "✓") == line.endswith(f": {example.title}") for line in lines)
    assert [panel.caption for panel in detection.examples[0].panels] == ["truth", "<b>", "uniform"]
    assert [panel.caption for panel in segmentation.examples[0].panels] == ["image", "truth", "<b>", "uniform"]
    assert "disc" in dict(segmentation.legend)
    shapes = {panel.picture.size for example in detection.examples for panel in example.panels}
    assert shapes == {(480, 480)}


def test_labels_stay_in_the_picture_and_off_each_other():
    draw = ImageDraw.Draw(Image.new("RGB", (300, 200)))
    taken = []
    for box in [(-5.0, 2.0, 80.0, 60.0), (0.0, 4.0, 90.0, 66.0), (280.0, 190.0, 320.0, 210.0)]:
        write_label(draw, box, "triangle 0.95", (200, 30, 30), 18, taken)
    assert all(0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 200 for x0, y0, x1, y1 in taken)
    assert taken[1][1] >= taken[0][3]


def test_a_comparison_of_one_task_without_finished_runs_has_a_page(tmp_path):
    results = make_results("vit", tasks=("classification",), seeds=(0,))
    results["rows"]["vit"]["figures"].clear()
    results |= {"best": {}, "baselines": {}, "git_commit": None, "commits": []}
    jobs = [Run("vit", "classification", 0, tmp_path / "vit")]
    page = Page(write_report(results, {}, jobs, None, tmp_path / "out").read_text(encoding="utf-8"))
    headings = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    assert headings == ["figures", "rows", "repeat"]
    assert "unknown" in page.words


def test_the_images_shown_have_many_classes_between_them():
    assert most_classes([{1}, {1, 2}, {3}, {1, 2, 3}, {4}], 2) == [3, 4]
    assert most_classes([{1}, set()], 4) == [0, 1]


def test_neighbouring_classes_have_other_hues():
    assert len({class_color(index) for index in range(40)}) == 40
    hues = [colorsys.rgb_to_hsv(*class_color(index))[0] for index in range(7)]
    assert min(abs(a - b) for a, b in itertools.pairwise(hues)) > 0.04
