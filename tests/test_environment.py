"""The environment: setup does what it must and no more, the lock file is complete, the doctor finds what is broken."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import install_detectron2
import pytest
import setup_env

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose setup records its commands instead of installing; ``commands`` empties with each call."""
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==2\n")
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "LOCK": lock,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "stamp",
        "INPUTS": (lock,),
        "FREE_BYTES": 0,
    }.items():
        monkeypatch.setattr(setup_env, name, value)
    recorded = []

    def run(command):
        recorded.append(" ".join(str(part) for part in command))
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        if not setup_env.PYTHON.exists():
            setup_env.PYTHON.symlink_to(sys.executable)

    monkeypatch.setattr(setup_env, "run", run)
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])

    def commands():
        taken = list(recorded)
        recorded.clear()
        return taken

    return lock, commands, monkeypatch


def test_setup_installs_lock_detectron2_and_project_in_this_order(checkout):
    _, commands, _ = checkout
    assert setup_env.main() == 0
    ran = commands()
    steps = ["-m venv", "install --quiet uv==", "requirements.lock", "install_detectron2.py", "--no-build-isolation -e"]
    assert len(ran) == len(steps)
    for command, step in zip(ran, steps, strict=True):
        assert step in command


def test_second_setup_does_nothing_and_a_changed_lock_installs_again(checkout):
    lock, commands, _ = checkout
    setup_env.main()
    commands()
    assert setup_env.main() == 0
    assert commands() == []
    lock.write_text("numpy==3\n")
    assert setup_env.main() == 0
    assert any("requirements.lock" in command for command in commands())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), subprocess.CalledProcessError(1, ["pip", "install", "x"])])
def test_interrupted_setup_starts_over(checkout, stop, capsys):
    lock, commands, monkeypatch = checkout
    setup_env.main()
    lock.write_text("numpy==3\n")

    def fail():
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install_project", fail)
        if isinstance(stop, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                setup_env.main()
        else:
            assert setup_env.main() == 2
            assert "`pip install x` failed" in capsys.readouterr().err
    assert not setup_env.STAMP.exists()
    commands()
    assert setup_env.main() == 0
    assert commands()


def test_make_lock_keeps_pins_and_leaves_out_paths_of_this_machine(checkout):
    lock, _, monkeypatch = checkout

    def compile_lock(command):
        output, constraints = Path(command[-1]), command[command.index("--constraints") + 1]
        assert output.read_text() == "numpy==2\n"
        output.write_text(f"numpy==2\n    # via\n    #   -c {constraints}\n    #   karvis (pyproject.toml)\n")

    monkeypatch.setattr(setup_env, "run", compile_lock)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--lock"])
    assert setup_env.main() == 0
    body = "numpy==2\n    # via\n    #   karvis (pyproject.toml)\n"
    assert lock.read_text() == setup_env.LOCK_HEADER + body


def test_setup_refuses_a_full_disk(checkout, capsys):
    _, commands, monkeypatch = checkout
    monkeypatch.setattr(setup_env, "FREE_BYTES", 10**18)
    assert setup_env.main() == 2
    assert "GB free" in capsys.readouterr().err
    assert commands() == []


def test_make_setup_takes_under_two_seconds_when_nothing_changed():
    stamp = ROOT / ".venv" / "karvis-setup.sha256"
    if not stamp.exists() or stamp.read_text() != setup_env.fingerprint():
        pytest.skip("this environment was not made by `make setup`")
    start = time.perf_counter()
    subprocess.run(["make", "setup"], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    assert time.perf_counter() - start < 2


def test_make_without_a_suitable_python_says_what_to_do():
    result = subprocess.run(["make", "PYTHON=", "setup"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "no Python 3.11 or 3.12 found" in result.stderr and "make PYTHON=" in result.stderr


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_targets_run_setup_themselves(target):
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plan.index("tools/setup_env.py") < plan.index(".venv/bin/python")


def test_lock_file_pins_every_dependency_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert text.startswith(setup_env.LOCK_HEADER)
    body = text.removeprefix(setup_env.LOCK_HEADER)
    assert not re.search(r"://|file:|/dev/|/tmp|^\s*#?\s*-", body, re.MULTILINE)
    pinned = set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in wanted} <= pinned
    assert {"torch==2.11.0", "torchvision==0.26.0"} <= set(text.split())


def test_unreachable_source_of_detectron2_costs_seconds(monkeypatch):
    monkeypatch.setattr(install_detectron2, "SOURCE", "https://karvis.invalid/detectron2")
    start = time.perf_counter()
    assert "cannot be reached" in install_detectron2.install_source()
    assert time.perf_counter() - start < install_detectron2.REACH_SECONDS + 1


def test_wheel_with_another_hash_is_not_installed(monkeypatch):
    calls = []

    def pip(command, *arguments, **_):
        calls.append(command)
        Path(arguments[arguments.index("--dest") + 1], "sal_detectron2-0.7.2-py3-none-any.whl").write_bytes(b"other")

    monkeypatch.setattr(install_detectron2, "pip", pip)
    assert "sha256" in install_detectron2.install_wheel()
    assert calls == ["download"]


def doctor(**env):
    command = [sys.executable, str(ROOT / "tools" / "doctor.py")]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_doctor_passes_here_and_runs_each_op_against_its_reference():
    result = doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equals its reference") == 2
    assert "everything needed works" in result.stdout and "BROKEN" not in result.stdout


def test_doctor_starts_without_torch_and_prints_the_command_that_mends_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libbroken.so not found')")
    result = doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if "BROKEN  torch:" in line)
    assert "libbroken.so not found" in lines[at] and "run: make setup" in lines[at + 1]
    assert "Traceback" not in result.stderr
