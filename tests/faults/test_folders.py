"""One run a folder: used folders, other processes, leftovers, and what the disk refuses."""

import errno
import json
import os
import shutil
import signal
import time
from unittest import mock

import pytest
from tasks import run_with_fault, same_results

from backbones.training import state
from backbones.training.folder import Claim, wait_until_free
from backbones.utils.errors import UserError, describe


def test_a_finished_run_is_not_overwritten(task, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        task.train(whole)
    assert (whole / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("left", ["checkpoint.pth", "model.safetensors"])
def test_a_folder_with_part_of_a_run_is_not_overwritten(task, tmp_path, left):
    (tmp_path / left).write_bytes(b"something of value")
    with pytest.raises(UserError, match=f"holds a run already .{left}.*--resume"):
        task.train(tmp_path)
    assert (tmp_path / left).read_bytes() == b"something of value"


def test_nothing_to_resume_is_said_and_no_folder_made(task, tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume.*Leave out --resume"):
        task.train(tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_a_file_in_the_way_is_named(task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        task.train(tmp_path / "file" / "run")


def hold(path, ready):
    with Claim(path):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path, processes):
    """A process that holds ``tmp_path / run``."""
    ready = processes.Event()
    process = processes.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_folder_in_use_is_refused_with_the_other_s_number(task, holder, tmp_path):
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
        task.train(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock"}


def test_the_lock_dies_with_its_process(task, holder, tmp_path, whole):
    holder.kill()
    holder.join()
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    task.train(tmp_path / "run", resume=True)


def test_a_folder_is_claimed_once_in_a_process_too_and_freed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Claim(tmp_path):
        with pytest.raises(UserError, match="in use by process"):
            Claim(tmp_path)
        raise ZeroDivisionError
    Claim(tmp_path).release()


def test_a_lock_file_of_garbage_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00{")
    Claim(tmp_path).release()


def test_data_loading_workers_do_not_keep_the_lock(tmp_path):
    with Claim(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        wait_until_free(tmp_path, 1.0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_waiting_for_a_folder_ends(tmp_path, holder):
    with pytest.raises(UserError, match="in use"):
        wait_until_free(tmp_path / "run", 0.5)


def test_a_half_written_file_of_a_dead_process_is_swept(task, whole, processes, tmp_path):
    folder = tmp_path / "run"
    arguments = (task, folder, False, signal.SIGKILL, "save", 2, tmp_path / "log")
    process = processes.Process(target=run_with_fault, args=arguments)
    process.start()
    process.join(120)
    assert len(list(folder.glob(".checkpoint.pth.*.part"))) == 1
    task.train(folder, resume=True)
    assert not list(folder.glob(".*.part"))
    same_results(folder, whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT])
def test_what_the_disk_refuses_is_one_message_and_loses_nothing(task, whole, tmp_path, number):
    folder, calls = tmp_path / "run", []
    real = state.seal

    def failing(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    with mock.patch.object(state, "seal", failing), pytest.raises(OSError) as error:
        task.train(folder)
    assert error.value.errno in (number, errno.ENOSPC)  # a quota is want of space too
    assert describe(error.value)
    assert not list(folder.glob(".*.part"))
    task.train(folder, resume=True)
    same_results(folder, whole)


def test_a_removed_folder_is_one_message_or_made_again(task, tmp_path):
    real, calls = state.seal, []

    def removing(path):
        calls.append(path)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "run")
        return real(path)

    with mock.patch.object(state, "seal", removing), pytest.raises(OSError) as error:
        task.train(tmp_path / "run")
    assert describe(error.value)


def test_metrics_never_hold_nan(tmp_path):
    from backbones.utils.files import write_json

    write_json(tmp_path / "metrics.json", {"a": float("nan"), "b": [1.5, {"c": float("inf")}]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": None, "b": [1.5, {"c": None}]}


def test_two_suites_in_one_folder_are_refused(tmp_path):
    import run_suite

    with Claim(tmp_path), pytest.raises(UserError, match="in use by process"):
        run_suite.main(["--backbones", "vit", "--out", str(tmp_path), "--quick"])
