"""The comparison: its rows, what it refuses, and how it goes on after a failure or with more to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_suite

from backbones.models.presets import FAMILIES
from suite import plan, runner, speed
from suite.plan import Data, Job, check_settings, job_folder, make_jobs, read_data
from suite.rows import CONTROLS, Row, named_rows
from suite.variants import read_variants

DATA = """
classification: {{root: {0}}}
detection: {{train_json: {0}/a.json, train_images: {0}, test_json: {0}/a.json, test_images: {0}}}
segmentation: {{data_root: {0}, overrides: [schedule.epochs=3]}}
groups: {{relations: [near, far]}}
"""


@pytest.fixture
def data_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    path = tmp_path / "data.yaml"
    path.write_text(DATA.format(tmp_path))
    return path


def variants(tmp_path, text, known=()):
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    return read_variants(str(path), "nano", known)


def words(job):
    return " ".join(job.command)


def test_the_commands_are_those_a_user_would_type(data_file, tmp_path):
    out = tmp_path / "out"
    jobs = make_jobs(named_rows("karat,vit"), "nano", read_data(str(data_file)), out, seeds=2)
    names = [job.name for job in jobs[:3]]
    assert names == ["karat classification, seed 0", "vit classification, seed 0", "karat detection, seed 0"]
    assert "train_net.py --config detection/vitdet_softmax.yaml --size nano" in words(jobs[3])
    assert f"MODEL.VIT.weights {job_folder(out, 'vit', 0, 'classification')}/model.safetensors" in words(jobs[3])
    assert jobs[4].command[-1] == "schedule.epochs=3"
    assert [next(w for w in (words(j).split()) if "seed=" in w or w == "SEED") for j in jobs[6::2]] == [
        "train.seed=1",
        "SEED",
        "randomness.seed=1",
    ]
    assert "SEED 1 " in words(jobs[8])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_config_for_every_task(data_file, tmp_path, family):
    jobs = make_jobs(named_rows(family), "nano", read_data(str(data_file)), tmp_path / "out", quick=True)
    configs = [word for job in jobs for word in job.command if word.startswith(("detection/", "segmentation/configs"))]
    assert len(configs) == 2
    assert all((plan.ROOT / config).is_file() for config in configs)


def test_every_control_of_every_family_it_has_sense_for_is_read_by_every_task(data_file, tmp_path):
    rows = named_rows(",".join(f"{family}.{name}" for name, c in CONTROLS.items() for family in c.families()))
    assert len(rows) == 33
    check_settings(make_jobs(rows, "nano", read_data(str(data_file)), tmp_path / "out"))


def test_a_control_alone_is_that_of_its_usual_family():
    rows = named_rows("uniform,none,frozen,linear,frozen_rational")
    assert [(row.name, row.family, row.control) for row in rows] == [
        ("uniform", "vit", "attention"),
        ("none", "vit", "attention"),
        ("frozen", "karat", "attention"),
        ("linear", "vit", "ffn"),
        ("frozen_rational", "kat", "ffn"),
    ]
    assert rows[0].settings == {"attention.kind": "uniform"}


SWEEP = """
rank:
  family: karat
  attention.rank: {sweep: [2, 4]}
  ffn: {ratio: 2.0}
place:
  family: karat
  attention:
    blocks: {sweep: {first: [0, 1], last: [4, 5]}}
    order: {sweep: [w_phi, phi_w]}
fine:
  family: vit
  window_size: 0
  pretraining: base
  detection: [SOLVER.EPOCHS, 5.0]
base: {family: kat, control: frozen_rational}
"""


def test_a_sweep_makes_rows_of_its_own(tmp_path):
    rows = {row.name: row for row in variants(tmp_path, SWEEP)}
    assert list(rows) == [
        *("rank-2", "rank-4"),
        *("place-first-w_phi", "place-first-phi_w", "place-last-w_phi", "place-last-phi_w"),
        *("fine", "base"),
    ]
    assert rows["rank-4"].settings == {"attention.rank": 4, "ffn.ratio": 2.0}
    assert rows["place-last-phi_w"].settings == {"attention.blocks": [4, 5], "attention.order": "phi_w"}
    assert rows["place-last-phi_w"].sweep == {"attention.blocks": "last", "attention.order": "phi_w"}
    assert rows["rank-4"].variant == "rank"
    assert rows["base"].control == "ffn"


def test_settings_of_a_variant_reach_all_three_tasks_and_no_pretraining_is_done_twice(tmp_path, data_file):
    rows = variants(tmp_path, SWEEP)
    jobs = make_jobs(rows, "nano", read_data(str(data_file)), tmp_path / "out")
    check_settings(jobs)
    by_name = {job.name: words(job) for job in jobs}
    assert "model.attention.blocks=[4, 5]" in by_name["place-last-phi_w classification, seed 0"]
    assert "MODEL.VIT.attention.blocks [4, 5]" in by_name["place-last-phi_w detection, seed 0"]
    assert "model.backbone.attention.blocks=[4,5]" in by_name["place-last-phi_w segmentation, seed 0"]
    assert by_name["fine detection, seed 0"].endswith("SOLVER.EPOCHS 5.0")
    assert "base/seed0/classification/model.safetensors" in by_name["fine detection, seed 0"]
    assert "fine classification, seed 0" not in by_name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- vit", r"variants.yaml must map names of rows.*it holds a list"),
        ("3", "it holds 3"),
        ("a: [", "not valid YAML"),
        ("? [a]\n: {family: vit}", "not valid YAML"),
        ("a: {family: vit}\na: {family: kat}", "'a' is given twice"),
        ("a: {family: vit, family: kat}", "'family' is given twice"),
        ("vit: {family: vit}", "'vit' is named twice"),
        ("a: 3", "row 'a' is 3; it must hold keys"),
        ("a: {family: swim}", "family is 'swim'; allowed: vit,.*Did you mean 'swin'"),
        ("a: {attention.rank: 4}", "family is None"),
        ("a: {family: {sweep: [vit, kat]}}", "family is {'sweep': .*allowed: vit"),
        ("a: {family: vit, control: [uniform]}", "control is \\['uniform'\\]; allowed: uniform"),
        ("a: {family: vit, attention.kind: none}", "row 'a': attention.kind 'none' leaves the class token"),
        ("data: {family: vit}", "row name 'data' is that of the comparison's own data"),
        ("a: {family: karat, attention.rnk: 4}", "has no key 'attention.rnk'. Did you mean 'attention.rank'"),
        ("a: {family: karat, attention.rnk: {sweep: [4]}}", "has no key 'attention.rnk'"),
        ("a: {family: karat, img_size: 32}", "has no key 'img_size'"),
        ("a: {family: karat, attention.rank: many}", "row 'a': attention.rank is 'many'"),
        ("a: {family: karat, attention.rank: 400}", "rank 400 exceeds"),
        ("a: {family: karat, attention.rank: {sweep: 3}}", "sweep of attention.rank is 3; it must be a list"),
        ("a: {family: karat, attention.rank: {sweep: []}}", "must be a list of values"),
        ("a: {family: karat, attention.rank: {sweep: [4, 4]}}", "has a value twice"),
        ("a: {family: karat, attention.rank: {swep: [4]}}", "has no key 'swep'. Did you mean 'sweep'"),
        ("a: {family: karat, attention.rank: {sweep: {'../x': 4}}}", "'../x'; it must be a word"),
        ("'../a': {family: karat}", "row name '../a'"),
        ("a: {family: karat, control: uniform}", "control 'uniform' has no sense for 'karat'; allowed: vit"),
        ("a: {family: vit, control: unifrom}", "control is 'unifrom'; allowed: uniform.*Did you mean 'uniform'"),
        ("a: {family: vit, pretraining: b}", "pretraining is 'b'; it must be a row"),
        ("a: {family: vit, pretraining: b}\nb: {family: vit, pretraining: vit}", "row 'a': pretraining is 'b'"),
        ("a: {family: vit, detection: 5}", "detection is 5; it must be a list"),
        ("a: {family: vit, attention.frozen: true, attention.kind: uniform}", "attention.frozen is True"),
    ],
)
def test_a_wrong_variants_file_is_named_with_row_and_value(tmp_path, text, message):
    with pytest.raises(
        ValueError, match=rf"(?s)--variants:? .*variants.yaml.*{message}" if "variants" not in message else message
    ):
        variants(tmp_path, text, [Row("vit", "vit")])


def test_a_family_without_the_size_is_refused(tmp_path):
    (tmp_path / "v.yaml").write_text("a: {family: swin}")
    with pytest.raises(ValueError, match=r"v.yaml: row 'a': unknown size of swin 'base'; allowed: nano, tiny"):
        read_variants(str(tmp_path / "v.yaml"), "base")


def test_a_wrong_setting_of_a_task_is_named_before_anything_runs(tmp_path, data_file):
    rows = variants(tmp_path, "a: {family: vit, segmentation: [schedule.epoch=3]}")
    with pytest.raises(ValueError, match=r"v\.yaml: row 'a', segmentation: schedule has no key 'epoch'"):
        check_settings(make_jobs(rows, "nano", read_data(str(data_file)), tmp_path / "out"), {"a": "v.yaml: "})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("root:", "rot:", 1), "Did you mean 'root'"),
        (lambda text: text.replace("segmentation", "segmentatoin"), "Did you mean 'segmentation'"),
        (lambda text: text.replace("a.json", "b.json"), r"detection.train_json .*b.json does not exist"),
        (lambda text: "classification: [", "not valid YAML"),
        (lambda text: "3", "must hold the keys"),
        (lambda text: text.split("detection")[0], "needs the section detection"),
        (lambda text: text.replace("[near, far]", "near"), "groups is .*must map names to lists"),
    ],
)
def test_a_wrong_data_file_is_named(data_file, change, message):
    data_file.write_text(change(data_file.read_text()))
    with pytest.raises(ValueError, match=message):
        read_data(str(data_file))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backbones", "vit,swim"], "unknown backbone 'swim'.*Did you mean 'swin'"),
        (["--backbones", "vit,vit"], "named twice"),
        (["--backbones", ","], "there is no row"),
        (["--backbones", "karat.uniform"], "control 'uniform' has no sense for 'karat'"),
        (["--backbones", "vit.unifrom"], "unknown backbone 'vit.unifrom'.*Did you mean 'uniform'"),
        (["--backbones", "vit,swin", "--size", "base"], "unknown size of swin 'base'; allowed: nano, tiny"),
        (["--size", "huge"], "unknown size of vit 'huge'; allowed: nano, tiny"),
        (["--data", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--variants", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--tasks", "detectoin"], "Did you mean 'detection'"),
        (["--tasks", ""], "--tasks is ''"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--seeds", "0"], "--seeds is 0"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_suite.main(["--out", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_comparison(tmp_path):
    (tmp_path / "suite.json").write_text(json.dumps({"size": "tiny", "data": "sample", "quick": False}))
    with pytest.raises(ValueError, match="another size \\('tiny', now 'nano'\\)"):
        run_suite.main(["--out", str(tmp_path)])


def test_more_rows_tasks_and_seeds_add_to_a_comparison_and_another_row_of_the_same_name_is_refused(tmp_path):
    fixed = {"size": "nano", "data": "sample", "quick": False}
    vit, rank = Row("vit", "vit"), Row("rank-2", "karat", {"attention.rank": 2}, variant="rank")
    settings, rows = run_suite._extend(tmp_path, fixed, [vit], ["classification"], 2)
    (tmp_path / "suite.json").write_text(json.dumps(settings | {"rows": [row.to_dict() for row in rows]}))
    settings, rows = run_suite._extend(tmp_path, fixed, [rank], ["classification", "detection"], 1)
    assert settings["tasks"] == ["classification", "detection"]
    assert settings["seeds"] == 2
    assert [row.name for row in rows] == ["vit", "rank-2"]
    (tmp_path / "suite.json").write_text(json.dumps(settings | {"rows": [row.to_dict() for row in rows]}))
    other = Row("rank-2", "karat", {"attention.rank": 3}, variant="rank")
    with pytest.raises(ValueError, match=r"row 'rank-2' with another settings \(.*2.*now .*3"):
        run_suite._extend(tmp_path, fixed, [other], ["classification"], 1)


def script_job(folder, row, task, body):
    """A job whose process is a few lines of Python, in place of minutes of training."""
    code = "import sys, pathlib, time; folder = pathlib.Path(sys.argv[-1]); " + body
    path = folder / f"{row}_{task}.py"
    path.write_text(code)
    return Job(row, task, 0, row, folder / row / task, (sys.executable, str(path), str(folder / row / task)))


DONE = "(folder / 'metrics.json').write_text('{}'); (folder / 'model.safetensors').write_text('')"


def test_a_failed_run_ends_with_its_log_and_the_others_are_kept(tmp_path, capsys):
    jobs = [
        script_job(tmp_path, "vit", "classification", "sys.exit('error: data.root is gone')"),
        script_job(tmp_path, "kat", "classification", DONE),
        script_job(tmp_path, "vit", "detection", DONE),
        script_job(tmp_path, "kat", "detection", DONE),
    ]
    failed = runner.run_jobs(jobs, 2)
    assert failed["vit classification, seed 0"].endswith("error: data.root is gone")
    assert failed["vit detection, seed 0"] == "the pretraining of 'vit' is missing."
    assert [job.is_done() for job in jobs] == [False, True, False, True]
    # The cause mended, the same comparison goes on with what is missing.
    Path(jobs[0].command[1]).write_text("import sys, pathlib; folder = pathlib.Path(sys.argv[-1]); " + DONE)
    capsys.readouterr()
    assert runner.run_jobs(jobs, 1) == {}
    out = capsys.readouterr().out
    assert all(job.is_done() for job in jobs)
    assert out.count("[done before]") == 2
    assert "[started] kat" not in out


def test_an_interrupted_run_is_resumed(tmp_path):
    job = script_job(tmp_path, "vit", "classification", f"assert '--resume' in sys.argv; {DONE}")
    job.folder.mkdir(parents=True)
    (job.folder / "checkpoint.pth").write_text("")
    assert runner.run_jobs([job], 1) == {}
    assert job.is_done()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the runs of a killed suite on Linux only")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_suite_kills_its_runs(tmp_path, how):
    job = script_job(tmp_path, "vit", "classification", "(folder / 'began').touch(); time.sleep(100)")
    code = (
        "import signal, sys; from pathlib import Path; sys.path.insert(0, 'tools'); from suite import plan, runner\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"job = plan.Job('vit', 'classification', 0, 'vit', Path({str(job.folder)!r}), {job.command!r})\n"
        "runner.run_jobs([job], 1)"
    )
    suite = subprocess.Popen([sys.executable, "-c", code], cwd=plan.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (job.folder / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    suite.send_signal(how)
    suite.wait(timeout=30)
    while _alive(job.command[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(job.command[1])


def _alive(script):
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and int(process.name) != os.getpid():
                command = (process / "cmdline").read_bytes().split(b"\0")
                if command[:1] == [sys.executable.encode()] and script.encode() in command:
                    return True
        except OSError:
            continue
    return False


def test_sample_paths_and_groups_are_what_the_generator_writes(sample_data):
    data = plan.sample_data(sample_data)
    assert isinstance(data, Data)
    paths = [value for task in plan.TASKS for value in getattr(data, task).values()]
    assert all(Path(path).exists() for path in paths)
    assert data.groups == {"relations": ["warm", "cold"]}


def test_speed_is_measured_twice_in_turns_and_only_once(tmp_path, monkeypatch):
    order = []

    def measured(row, size):
        order.append(row.name)
        return {"images_per_s": float(len(order)), "memory_mib": None}

    monkeypatch.setattr(speed, "_measure_apart", measured)
    rows = named_rows("vit,kat")
    found = speed.measure_rows(rows, "nano", tmp_path / "speed.json")
    assert order == ["vit", "kat", "kat", "vit"]
    assert found["vit"] == {"images_per_s": [1.0, 4.0], "memory_mib": [None, None]}
    speed.measure_rows([*rows, Row("swin", "swin")], "nano", tmp_path / "speed.json")
    assert order[4:] == ["swin", "swin"]


def test_a_failed_measurement_costs_no_other_row_its_figure_and_is_tried_again(tmp_path, monkeypatch):
    broken = ["kat"]
    monkeypatch.setattr(speed, "_measure_apart", lambda row, _: {} if row.name in broken else {"images_per_s": 2.0})
    rows = named_rows("vit,kat")
    assert speed.measure_rows(rows, "nano", tmp_path / "speed.json") == {"vit": {"images_per_s": [2.0, 2.0]}}
    broken.clear()
    assert set(speed.measure_rows(rows, "nano", tmp_path / "speed.json")) == {"vit", "kat"}


def test_a_measurement_that_dies_says_why(capsys, monkeypatch):
    monkeypatch.setattr(speed.sys, "executable", "/bin/false")
    assert speed._measure_apart(Row("vit", "vit"), "nano") == {}
    assert "[failed] speed of vit: no message" in capsys.readouterr().out


@pytest.mark.slow
def test_one_measurement_of_a_backbone_is_of_its_step_alone():
    found = speed._measure_apart(Row("small", "vit", {"depth": 1}), "nano")
    assert found["images_per_s"] > found["train_images_per_s"] > 0
    assert sys.platform != "linux" or 1 < found["memory_mib"] < 200
