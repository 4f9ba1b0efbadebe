"""The comparison: what it refuses, how it goes on after a failure, and what its report holds."""

import json
import sys
from pathlib import Path

import pytest
import run_suite

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.models.presets import FAMILIES, preset_name
from suite import plan, runner
from suite.figures import COLORS, function_panels, learned_functions
from suite.plan import Data, Job, make_jobs, read_data

DATA = """
classification: {{root: {0}}}
detection: {{train_json: {0}/a.json, train_images: {0}, test_json: {0}/a.json, test_images: {0}}}
segmentation: {{data_root: {0}, overrides: [schedule.epochs=3]}}
"""


@pytest.fixture
def data_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    path = tmp_path / "data.yaml"
    path.write_text(DATA.format(tmp_path))
    return path


def test_the_commands_are_those_a_user_would_type(data_file, tmp_path):
    jobs = make_jobs(["karat", "vit"], "nano", read_data(str(data_file)), tmp_path / "out", quick=False)
    assert [job.name for job in jobs[:3]] == ["karat classification", "vit classification", "karat detection"]
    detection = " ".join(jobs[3].command)
    assert "train_net.py --config detection/vitdet_softmax.yaml --size nano" in detection
    assert f"MODEL.VIT.weights {tmp_path}/out/vit/classification/model.safetensors" in detection
    assert jobs[4].command[-1] == "schedule.epochs=3"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_config_for_every_task(data_file, tmp_path, family):
    jobs = make_jobs([family], "nano", read_data(str(data_file)), tmp_path / "out", quick=True)
    configs = [word for job in jobs for word in job.command if word.startswith(("detection/", "segmentation/configs"))]
    assert len(configs) == 2
    assert all((plan.ROOT / config).is_file() for config in configs)
    assert family in COLORS


def test_a_swin_is_detected_by_fpn_and_learned_functions_are_those_of_its_stages(data_file, tmp_path):
    jobs = make_jobs(["vit", "karat_swin", "kat"], "nano", read_data(str(data_file)), tmp_path / "out", quick=True)
    assert "train_net.py --config detection/fpn_karat_swin.yaml --size nano" in " ".join(jobs[4].command)
    pretrained = jobs[:3]
    for job in pretrained:
        job.folder.mkdir(parents=True)
        network = create_backbone(preset_name(job.family, "nano"), num_classes=2)
        save_backbone(job.folder / "model.safetensors", network, classes=["a", "b"])
    titles = [title for title, _ in function_panels(pretrained)]
    assert titles == [
        *(f"kat blocks.{b}: F2 by group" for b in (0, 3, 5)),
        *(f"karat_swin layers.{s}.blocks.{b}: φ of head 0" for s, b in ((0, 0), (2, 0), (3, 1))),
    ]
    assert learned_functions(pretrained).startswith(b"\x89PNG")
    assert learned_functions(pretrained[:1]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("root:", "rot:", 1), "Did you mean 'root'"),
        (lambda text: text.replace("segmentation", "segmentatoin"), "Did you mean 'segmentation'"),
        (lambda text: text.replace("a.json", "b.json"), r"detection.train_json .*b.json does not exist"),
        (lambda text: "classification: [", "not valid YAML"),
        (lambda text: "3", "must hold the keys"),
        (lambda text: text.split("detection")[0], "needs the section detection"),
    ],
)
def test_a_wrong_data_file_is_named(data_file, change, message):
    data_file.write_text(change(data_file.read_text()))
    with pytest.raises(ValueError, match=message):
        read_data(str(data_file))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbones", "vit,swim"], "unknown backbone 'swim'"),
        (["--backbones", "vit,vit"], "at most once"),
        (["--backbones", "vit,swin", "--size", "base"], "unknown size of swin 'base'; allowed: nano, tiny"),
        (["--size", "huge"], "unknown size of vit 'huge'; allowed: nano, tiny"),
        (["--data", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--jobs", "0"], "--jobs is 0"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_suite.main(["--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_comparison(tmp_path):
    (tmp_path / "suite.json").write_text(json.dumps({"size": "tiny", "data": "sample", "quick": False}))
    with pytest.raises(ValueError, match="another size \\('tiny', now 'nano'\\)"):
        run_suite.main(["--out", str(tmp_path)])


def script_job(folder, family, task, body):
    """A job whose process is a few lines of Python, in place of minutes of training."""
    code = "import sys, pathlib; folder = pathlib.Path(sys.argv[-1]); " + body
    path = folder / f"{family}_{task}.py"
    path.write_text(code)
    return Job(family, task, folder / family / task, (sys.executable, str(path), str(folder / family / task)))


DONE = "(folder / 'metrics.json').write_text('{}'); (folder / 'model.safetensors').write_text('')"


def test_a_failed_run_ends_with_its_log_and_the_others_are_kept(tmp_path, capsys):
    jobs = [
        script_job(tmp_path, "vit", "classification", "sys.exit('error: data.root is gone')"),
        script_job(tmp_path, "kat", "classification", DONE),
        script_job(tmp_path, "vit", "detection", DONE),
        script_job(tmp_path, "kat", "detection", DONE),
    ]
    with pytest.raises(ValueError, match=r"(?s)1 of 4 runs failed.*error: data.root is gone.*same command again"):
        runner.run_jobs(jobs, 2)
    assert [job.is_done() for job in jobs] == [False, True, False, True]
    # The cause mended, the same comparison goes on with what is missing.
    Path(jobs[0].command[1]).write_text("import sys, pathlib; folder = pathlib.Path(sys.argv[-1]); " + DONE)
    capsys.readouterr()
    runner.run_jobs(jobs, 1)
    out = capsys.readouterr().out
    assert all(job.is_done() for job in jobs)
    assert out.count("[done before]") == 2
    assert "[started] kat" not in out


def test_an_interrupted_run_is_resumed(tmp_path):
    job = script_job(tmp_path, "vit", "classification", f"assert '--resume' in sys.argv; {DONE}")
    job.folder.mkdir(parents=True)
    (job.folder / "checkpoint.pt").write_text("")
    runner.run_jobs([job], 1)
    assert job.is_done()


def test_sample_paths_are_what_the_generator_writes(sample_data):
    data = plan.sample_data(sample_data)
    assert isinstance(data, Data)
    paths = [value for task in plan.TASKS for value in getattr(data, task).values()]
    assert all(Path(path).exists() for path in paths)
