"""The figures of a comparison: means and spreads, what is best, what controls reach, and what README shows of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import update_docs
from scipy import stats

from report.page import markdown_table
from report.results import collect
from report.statistics import best_of, half_width, judge_control, paired_difference, summarize
from suite.plan import Data, make_jobs
from suite.rows import named_rows

ROOT = Path(__file__).resolve().parents[1]


def figures(*values):
    return summarize({str(seed): value for seed, value in enumerate(values)})


def test_a_summary_is_mean_and_sample_deviation_with_every_value():
    assert figures(1.0, 2.0, 6.0) == {
        "mean": 3.0,
        "std": pytest.approx(7**0.5),
        "by_seed": {"0": 1.0, "1": 2.0, "2": 6.0},
    }
    assert figures(4.0)["std"] is None


def test_the_margin_is_half_of_scipy_s_paired_interval():
    a, b = np.array([3.0, 5.0, 4.0, 7.0]), np.array([1.0, 4.0, 4.0, 2.0])
    mean, deviation = paired_difference(figures(*a), figures(*b))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx((a - b).mean())
    assert deviation == pytest.approx((a - b).std(ddof=1))
    assert half_width(figures(*a), figures(*b)) == pytest.approx((interval.high - interval.low) / 2)


def test_only_common_seeds_are_paired():
    a, b = summarize({"0": 9.0, "1": 5.0, "2": 6.0}), summarize({"1": 4.0, "2": 4.0})
    assert paired_difference(a, b)[0] == pytest.approx(1.5)
    assert paired_difference(a, summarize({"1": 4.0}))[1] is None


@pytest.mark.parametrize(
    ("rows", "better", "row", "clear"),
    [
        # The seeds' luck is shared: the spread is large, the paired differences are not.
        ({"a": (60.0, 70.0, 80.0), "b": (58.0, 68.1, 77.9)}, "max", "a", True),
        ({"a": (60.0, 70.0, 80.0), "b": (58.0, 75.0, 76.0)}, "max", "a", False),
        ({"a": (60.0, 70.0, 80.0), "b": (50.0, 60.1, 69.9), "c": (59.0, 71.0, 79.0)}, "max", "a", False),
        ({"a": (3.0, 4.0, 5.0), "b": (1.0, 2.1, 2.9)}, "min", "b", True),
        ({"a": (60.0,), "b": (10.0,)}, "max", "a", False),  # one seed proves nothing
        ({"a": (60.0, 61.0, 62.0)}, "max", "a", False),  # nor does a row alone
    ],
)
def test_best_is_clear_only_where_paired_differences_are_clear_of_zero(rows, better, row, clear):
    best = best_of({name: figures(*values) for name, values in rows.items()}, better)
    assert (best["row"], best["clear"]) == (row, clear)


def test_a_control_within_the_spread_is_told_from_one_that_loses():
    best = figures(60.0, 62.0, 64.0)
    losing, near = figures(40.0, 42.1, 43.9), figures(58.0, 64.0, 61.0)
    assert judge_control(best, {"u": losing}, "max") == {
        "row": "u",
        "share": pytest.approx(42.0 / 62.0),
        "within_spread": False,
    }
    judged = judge_control(best, {"u": losing, "n": near}, "max")
    assert (judged["row"], judged["within_spread"]) == ("n", True)
    # Differences 20, 2, 8 (mean 10, deviation 9.2): far from proven, and yet outside of the spread.
    assert judge_control(best, {"u": figures(40.0, 60.0, 56.0)}, "max")["within_spread"] is False
    assert judge_control(best, {"u": figures(40.0, 62.0, 60.0)}, "max")["within_spread"] is True  # 20, 0, 4: 8 and 10.6
    assert judge_control(figures(3.0), {"u": figures(3.0)}, "max")["within_spread"] is None
    assert judge_control(best, {}, "max") is None


@pytest.fixture
def finished(tmp_path):
    """Folders as runs leave them, without their trainings; detection of the control failed with seed 1."""
    data = Data(
        {"root": "c"}, {"train_json": "j"}, {"data_root": "s"}, groups={"relations": ["near", "far"], "pets": ["cat"]}
    )
    rows = named_rows("vit,uniform")
    jobs = make_jobs(rows, "nano", data, tmp_path, seeds=2)
    for job in jobs:
        worse = 10.0 * (job.row == "uniform") + job.seed
        metrics = {
            "classification": {
                "top1": 60 - worse,
                "top1_per_class": {"near": 50.0 - worse, "far": 70.0 - worse, "disc": None},
            },
            "detection": {
                **{"box_ap": 20 - worse, "box_ap50": 40 - worse, "mask_ap": 15.0},
                "box_ap50_per_class": {"near": 30.0, "far": None, "disc": 2.0},
            },
            "segmentation": {
                **{"miou": 30 - worse, "miou_most_frequent_class": 9.75},
                "iou_per_class": {"background": 90.0, "near": 20.0, "far": 10.0},
            },
        }[job.task]
        job.folder.mkdir(parents=True)
        (job.folder / "run.json").write_text('{"git_commit": "abc"}')
        if job.name != "uniform detection, seed 1":
            (job.folder / "metrics.json").write_text(json.dumps(metrics | {"images_per_s": 1.5 + worse}))
            (job.folder / "model.safetensors").write_text("")
    settings = {"size": "nano", "data": "x", "quick": False, "tasks": [*"cds"], "seeds": [0, 1]}
    settings["tasks"] = ["classification", "detection", "segmentation"]
    failures = {"uniform detection, seed 1": "killed"}
    return lambda out: collect(rows, jobs, failures, data, settings, out)


def test_results_hold_every_figure_of_every_seed_and_the_groups_that_a_task_knows(finished, tmp_path):
    results = finished(tmp_path / "a")
    assert [c["heading"] for c in results["columns"]] == [
        *("top-1 %", "top-1 %, relations"),
        *("box AP", "box AP50", "box AP50, relations", "mask AP", "mIoU %", "mIoU %, relations"),
    ]
    vit, uniform = results["rows"]["vit"]["figures"], results["rows"]["uniform"]["figures"]
    assert vit["classification.top1"]["by_seed"] == {"0": 60.0, "1": 59.0}
    assert vit["classification.top1@relations"]["by_seed"] == {"0": 60.0, "1": 59.0}
    assert vit["detection.box_ap50@relations"]["mean"] == 30.0  # a class without objects has no figure
    assert vit["segmentation.miou@relations"]["mean"] == 15.0
    assert uniform["detection.box_ap"]["by_seed"] == {"0": 10.0}
    assert results["rows"]["uniform"]["failures"] == {"detection": {"1": "killed"}}
    assert results["baselines"]["classification.top1"] == pytest.approx(100 / 3)
    assert "classification.top1@relations" not in results["baselines"]
    assert results["baselines"]["segmentation.miou"] == 9.75
    judged = results["controls"]["classification.top1"]["attention"]
    assert (judged["row"], judged["within_spread"]) == ("uniform", False)
    assert judged["share"] == pytest.approx(49.5 / 59.5)
    assert results["commits"] == ["abc"]


def test_the_same_runs_give_the_same_file_whatever_their_speed(finished, tmp_path):
    finished(tmp_path / "a")
    for path in tmp_path.rglob("metrics.json"):
        path.write_text(path.read_text().replace('"images_per_s": 1', '"images_per_s": 2'))
    finished(tmp_path / "b")
    assert (tmp_path / "a" / "results.json").read_bytes() == (tmp_path / "b" / "results.json").read_bytes()


@pytest.mark.parametrize("name", update_docs.PAGES)
def test_the_tables_of_the_documentation_are_those_of_their_figures(name):
    saved = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / update_docs.PAGES[name][0]).read_text(encoding="utf-8")
    assert update_docs.with_table(name, page, markdown_table(saved["results"], saved["speed"])) == page
    assert saved["git_commit"]


def test_the_demo_is_one_seed_with_a_control():
    results = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))["results"]
    assert results["settings"]["seeds"] == [0]
    assert results["rows"]["uniform"]["control"] == "attention"


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match=r"README\.md has no place for the table"):
        update_docs.with_table("demo", "# Karvis", "| a |")
