"""The benchmark: what it measures and writes, the gate that keeps wrong contestants from a speed, what it refuses."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import benchmark
import pytest
import torch

from backbones.ops.rational.reference import group_rational_reference
from backbones.utils.errors import UserError
from bench import attention, cases, models, operators, timing
from bench.gate import Gate

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
RATIONAL = ["rational", "--device", "cpu", "--shapes", "smoke", "--rounds", "3", "--contestants", "reference,karvis"]
MODEL = [
    "model",
    "--device",
    "cpu",
    "--batch",
    "2",
    "--rounds",
    "1",
    "--archs",
    "vit_nano_patch8_64,kat_nano_patch8_64",
]


def with_contestant(call):
    """The group_rational case with one more contestant, ``other``."""
    other = cases.Contestant("other", lambda problem: call)
    case = cases.CASES[0]
    return dataclasses.replace(case, contestants=(*case.contestants, other))


def run_other(call):
    problem = cases.Problem((3, 7, 16), torch.float32, CPU)
    rows = operators.run_case(with_contestant(call), problem, "fp32", ["karvis", "other"], 3, 0)
    return {row["contestant"]: row for row in rows}


def test_rational_writes_every_figure_and_how_it_was_measured(tmp_path, capsys):
    argv = [*RATIONAL, "--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert benchmark.main(argv) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] and result["seed"] == 0
    assert result["device"] and "rational --device cpu" in result["command"]
    alone = [row for row in result["rows"] if row["case"] == "group_rational"]
    assert [(r["contestant"], r["dtype"]) for r in alone] == [
        (name, dtype) for dtype in ("fp32", "bf16") for name in ("gelu", "reference", "karvis")
    ]
    fused = {row["case"] for row in result["rows"] if row["contestant"] == "karvis"}
    assert fused == {case.name for case in cases.CASES}
    for row in result["rows"]:
        assert row["problem"] is None and (row["peak_mib"] is None or row["peak_mib"] >= 0)
        assert min(row["forward_ms"], row["backward_ms"], row["forward_share"], row["backward_share"]) > 0
        assert row["contestant"].endswith("gelu") or row["errors"].keys() >= {"output", "x", "numerator", "denominator"}
    assert result["rows"][0]["ratio"] == 1
    assert "karvis" in capsys.readouterr().out
    assert (tmp_path / "r.md").read_text().count("| group_rational | 2x5x16 |") == 6


def test_model_writes_speeds_and_ratios_to_the_first(tmp_path):
    assert benchmark.main([*MODEL, "--json", str(tmp_path / "m.json")]) == 0
    vit, kat = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert vit["train_ratio"] == vit["forward_ratio"] == 1
    assert kat["train_ratio"] == pytest.approx(kat["train_img_per_s"] / vit["train_img_per_s"])
    assert kat["loss_first"] > 0 and kat["params"] > vit["params"]


def test_model_times_maps_of_networks_with_settings(tmp_path):
    vit, karat = "vit_nano_patch8_64+window_size=4+global_blocks=[1]", "karat_nano_patch8_64+attention.order=phi_w"
    archs = [f"{name}+depth=2" for name in (vit, karat)]
    argv = ["model", "--device", "cpu", "--batch", "1", "--rounds", "2", "--maps", "96", "--archs", ",".join(archs)]
    assert benchmark.main([*argv, "--json", str(tmp_path / "m.json")]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["arch"] for row in rows] == archs
    assert all(row["problem"] is None and row["train_img_per_s"] > 0 for row in rows)
    config = models.parse_network(archs[0], 96)
    assert (config.img_size, config.class_token, config.num_classes) == ((96, 96), False, 0)
    assert (config.window_size, config.global_blocks, config.depth) == (4, (1,), 2)
    assert models.parse_network(archs[1]).attention.order == "phi_w"


def test_attention_gates_karat_and_compares_it_with_softmax(tmp_path):
    argv = ["attention", "--device", "cpu", "--shapes", "smoke,2x2x65x32", "--grids", "1,2", "--rank", "3"]
    assert benchmark.main([*argv, "--rounds", "2", "--dtype", "fp32,bf16", "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert all(row["problem"] is None and row["forward_ms"] > 0 for row in rows)
    assert {row["case"] for row in rows} == {f"{order} G{g} r3" for order in ("w_phi", "phi_w") for g in (1, 2)}
    for row in rows:
        judged = row["contestant"] in ("naive", "karvis")
        assert ("errors" in row) == judged
        assert not judged or row["errors"].keys() == {"output", "q", "k", "v", "a", "b", "w"}


def test_wrong_attention_gets_its_error_and_no_speed(monkeypatch):
    monkeypatch.setattr(attention, "fourier_attention", lambda q, k, v, a, b, w, order: v * a.sum() * b.sum() * w.sum())
    assert benchmark.main(["attention", "--device", "cpu", "--shapes", "smoke", "--rank", "2", "--rounds", "1"]) == 1


def test_attention_that_would_not_fit_is_not_run():
    problem = attention.AttentionProblem((1, 12, 2**20, 64), torch.float32, CPU)
    with pytest.raises(cases.NotRunError, match=r"GiB, .* are free"):
        attention._naive(problem)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_of_the_process_is_what_a_run_adds():
    kept = torch.ones(2**22)

    def run():
        torch.ones(2**24).add_(kept.sum())  # 64 MiB

    peak = timing.peak_mib(run, CPU)
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 60 < peak < 80


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda x, numerator, denominator: 1.001 * group_rational_reference(x, numerator, denominator), "output"),
        (lambda x, numerator, denominator: group_rational_reference(x, numerator, denominator.detach()), "denominator"),
        (lambda x, numerator, denominator: group_rational_reference(x, numerator, denominator) * torch.nan, "output"),
    ],
    ids=["values", "missing gradient", "not finite"],
)
def test_wrong_contestant_gets_its_error_and_no_speed(wrong, named):
    rows = run_other(wrong)
    assert rows["other"]["problem"].startswith("wrong: ") and named in rows["other"]["problem"]
    assert "forward_ms" not in rows["other"] and "ratio" not in rows["other"]
    assert rows["karvis"]["problem"] is None and rows["karvis"]["forward_ms"] > 0


def test_contestant_that_raises_leaves_the_others_running():
    def broken(**_):
        raise RuntimeError("no kernel image\nand more")

    rows = run_other(broken)
    assert rows["other"]["problem"] == "failed: RuntimeError: no kernel image"
    assert rows["karvis"]["forward_ms"] > 0


def test_wrong_result_of_ours_is_the_exit_code(monkeypatch, capsys):
    def gelu(problem):
        return lambda x, numerator, denominator: torch.nn.functional.gelu(x)

    case = dataclasses.replace(cases.CASES[0], contestants=(cases.Contestant("karvis", gelu),))
    monkeypatch.setattr(cases, "CASES", (case,))
    assert benchmark.main([*RATIONAL[:-1], "karvis"]) == 1
    assert "karvis: wrong: output" in capsys.readouterr().out


def test_gate_in_chunks_is_the_gate_at_once(monkeypatch):
    problem = cases.Problem((5, 3, 16), torch.bfloat16, CPU)
    inputs = cases.rational_inputs(problem, torch.Generator().manual_seed(0))
    grad = torch.randn(problem.shape).bfloat16()
    reference = cases.rational_reference(problem)
    whole = Gate(reference, inputs, ("x",), grad).truth
    monkeypatch.setattr("bench.gate._CHUNK", 2 * 3 * 16)
    chunked = Gate(reference, inputs, ("x",), grad).truth
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-12, atol=1e-12)


def test_stages_get_what_the_stage_before_returned():
    seen = []
    times = timing.interleaved({"a": [lambda _: 3, seen.append], "b": [lambda _: None]}, CPU, rounds=4, warmup=1)
    assert seen == [3] * 5
    assert [len(values) for values in times["a"]] == [4, 4] and len(times["b"][0]) == 4


def test_backbone_without_gradients_gets_no_speed(monkeypatch):
    class Frozen(models.Trainee):
        def step(self, _=None):
            super().step()
            next(self.network.parameters()).grad = None

    monkeypatch.setattr(models, "Trainee", Frozen)
    (row,) = models.run_models(["vit_nano_patch8_64"], 1, "fp32", CPU, False, 1, 0)
    assert "got no gradient" in row["problem"] and "train_img_per_s" not in row


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rational", "--device", "gpu"], "allowed: 'cpu', 'cuda'"),
        (["rational", "--device", "cpu", "--dtype", "fp23"], "Did you mean 'fp32'"),
        (["rational", "--device", "cpu", "--shapes", "8x197"], "BxNxC"),
        (["rational", "--device", "cpu", "--shapes", "smal"], "Did you mean 'small'"),
        (["rational", "--device", "cpu", "--shapes", "2x3x20"], "width 20 is not divisible by --groups 8"),
        (["rational", "--device", "cpu", "--shapes", ","], "name at least one"),
        (["rational", "--device", "cpu", "--degrees", "5"], "such as 5,4"),
        (["rational", "--device", "cpu", "--groups", "0"], "at least 1"),
        (["rational", "--device", "cpu", "--form", "abs"], "allowed: 'sum_abs', 'abs_sum'"),
        (["rational", "--device", "cpu", "--contestants", "karvi"], "Did you mean 'karvis'"),
        (["rational", "--device", "cpu", "--rounds", "0"], "--rounds is 0"),
        (["attention", "--device", "cpu", "--shapes", "8x197x768"], "BxHxNxD such as 16x3x197x64"),
        (["attention", "--device", "cpu", "--shapes", "smoke"], "--rank is 12; it must be at most N, which is 5"),
        (["attention", "--device", "cpu", "--grids", "0"], "positive integers"),
        (["attention", "--device", "cpu", "--orders", "phi_phi"], "allowed: 'w_phi', 'phi_w'"),
        (["attention", "--device", "cpu", "--contestants", "navie"], "Did you mean 'naive'"),
        (["model", "--device", "cpu", "--archs", "kat_tiny"], "unknown backbone 'kat_tiny'"),
        (["model", "--device", "cpu", "--archs", "vit_nano_patch8_64+depth"], "settings are .KEY=VALUE"),
        (["model", "--device", "cpu", "--archs", "vit_nano_patch8_64+depht=2"], "Did you mean 'depth'"),
        (["model", "--device", "cpu", "--archs", "vit_nano_patch8_64", "--maps", "90"], "not divisible by the patch"),
        (["model", "--device", "cpu", "--dtype", "fp16"], "allowed: 'fp32', 'bf16'"),
        (["model", "--device", "cpu", "--batch", "-1"], "at least 1"),
    ],
)
def test_bad_input_says_what_is_allowed(argv, message):
    with pytest.raises(UserError, match="(?s).*" + message.replace("|", r"\|")):
        benchmark.main(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said():
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        benchmark.main(["rational", "--device", "cuda"])


def gpu_check(out, *stages, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh"), *stages],
        env={**os.environ, "DEVICE": "cpu", "OUT": str(out), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_gpu_check_goes_on_after_a_failing_stage_and_tells(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *rational*) echo broken; exit 3;; esac\necho ran "$@"\n')
    fake.chmod(0o755)
    result = gpu_check(tmp_path / "out", PYTHON=str(fake))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "rational: FAILED (exit 3)" in result.stdout and "model: ok" in result.stdout
    assert "broken" in (tmp_path / "out" / "rational.log").read_text()


def test_gpu_check_runs_only_the_stages_named_and_stops_at_the_limit(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    result = gpu_check(tmp_path / "out", "model", PYTHON=str(fake), LIMIT="1")
    assert result.returncode == 1 and "model: FAILED (longer than 1 s)" in result.stdout
    assert "rational" not in result.stdout
    unknown = gpu_check(tmp_path / "out", "modle")
    assert unknown.returncode == 2 and "unknown stage 'modle'" in unknown.stderr
