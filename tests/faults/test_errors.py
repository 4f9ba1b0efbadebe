"""What the machine or a user's file did is one message with exit code 2; control characters never reach a terminal."""

import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from backbones.utils.documents import parse_json
from backbones.utils.errors import UserError, check_choice, check_keys, check_name, describe, escaped, run_main, shown

ROOT = Path(__file__).resolve().parents[2]
WORKER = "DataLoader worker (pid(s) 41, 42) exited unexpectedly"
BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43928"
CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
CAUGHT = (
    "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n{}UserError: that"
)


def in_json(error):
    try:
        json.loads("[" * 10**5)
    except RecursionError as caught:
        return caught
    raise error


ENVIRONMENT = {
    "disk_full": (OSError(errno.ENOSPC, "", "f"), "no disk space"),
    "quota": (OSError(errno.EDQUOT, "", "f"), "quota"),
    "read_only": (OSError(errno.EROFS, "", "f"), "read-only"),
    "no_access": (PermissionError(errno.EACCES, "", "f"), "no permission for f"),
    "not_permitted": (PermissionError(errno.EPERM, "", "f"), "no permission for f"),
    "removed": (FileNotFoundError(errno.ENOENT, "", "f"), "f does not exist, or was removed"),
    "removed_bytes": (FileNotFoundError(errno.ENOENT, "", b"f\xff"), "does not exist"),
    "in_a_file": (NotADirectoryError(errno.ENOTDIR, "", "f"), "as if it were a folder"),
    "folder": (IsADirectoryError(errno.EISDIR, "", "f"), "is a folder"),
    "long_name": (OSError(errno.ENAMETOOLONG, "", "f" * 9999), "too long"),
    "links": (OSError(errno.ELOOP, "", "f"), "chain of links"),
    "disk_fails": (OSError(errno.EIO, "", "f"), "the disk failed at f"),
    "files": (OSError(errno.EMFILE, ""), "ulimit -n"),
    "files_of_machine": (OSError(errno.ENFILE, ""), "too many open files"),
    "memory_of_machine": (OSError(errno.ENOMEM, ""), "memory ran out"),
    "pipe": (BrokenPipeError(errno.EPIPE, ""), "output of this command"),
    "stale": (OSError(errno.ESTALE, "", "f"), "Stale file handle: f"),
    "no_code": (OSError("image file is truncated"), "image file is truncated"),
    "worker": (RuntimeError(WORKER), "a data-loading worker died"),
    "bus_error": (RuntimeError(BUS), "shared memory"),
    "shm": (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "worker died"),
    "gloo": (RuntimeError(GLOO), "another process of this run was lost"),
    "dist": (
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        "another process of this run was lost",
    ),
    "store": (torch.distributed.DistNetworkError("The client socket has timed out after 60000ms"), "was lost"),
    "killed": (RuntimeError("process 1 terminated with signal SIGKILL"), "was lost"),
    "memory": (MemoryError(), "Lower the batch size"),
    "cpu_memory": (RuntimeError(CPU_MEMORY), "Lower the batch size"),
    "gpu_memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Lower the batch size"),
    "written_by_torch": (RuntimeError("basic_ios::clear: No space left on device"), "no disk space"),
    "tar": (tarfile.ReadError("unexpected end of data"), "tar file is damaged"),
    "text_in": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8"),
    "text_out": (UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range"), "LC_ALL"),
    "nested": (in_json(None), "nested too deeply"),
    "in_a_worker": (UserError(CAUGHT.format("")), "that"),
    "in_a_process": (RuntimeError(CAUGHT.format("backbones.utils.errors.")), "that"),
}


@pytest.mark.parametrize("kind", ENVIRONMENT)
def test_environment_is_one_message_and_code_2(kind, capsys, monkeypatch):
    error, message = ENVIRONMENT[kind]
    assert message in describe(error)
    if kind == "pipe":
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)

    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(fail)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("error: ") and "defect" not in told and "Traceback" not in told


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), RecursionError(), ValueError("y"), KeyError("z"), TypeError("t")], ids=repr
)
def test_a_defect_stays_one(error):
    assert describe(error) is None


def test_reader_of_the_output_may_go():
    code = "from backbones.utils.errors import run_main\nrun_main(lambda _: [print(i) for i in range(10**6)] and 0)"
    command = f"{sys.executable} -c '{code}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: who read the output") and "Exception ignored" not in done.stderr


CONTROLS = {
    "ansi": "\x1b[31mred",
    "return": "a\rb",
    "bell": "\x07",
    "nul": "a\0b",
    "backspace": "a\x08",
    "csi": "\x9b31m",
    "override": "\u202ecod.exe",
    "isolate": "\u2066x",
    "surrogate": "\ud800",
    "line": "a\u2028b",
    "mark": "\ufeffx",
    "delete": "\x7f",
}


@pytest.mark.parametrize("kind", CONTROLS)
def test_control_characters_are_escaped_or_refused(kind, capsys):
    name = CONTROLS[kind]
    control = next(c for c in name if not c.isprintable())
    for text in (escaped(f"the class {name}"), shown(name), shown([name]), shown({name: name})):
        assert control not in text and "\\" in text

    def fail(argv):
        raise UserError(f"no folder {name}")

    with pytest.raises(SystemExit):
        run_main(fail)
    assert control not in capsys.readouterr().err
    with pytest.raises(UserError, match="without control characters") as caught:
        check_name("a class", name)
    assert control not in str(caught.value)


def test_names_of_other_scripts_stay():
    for name in ("größe", "猫", "می‌خواهم", "👩‍🚀", "a b", "$x$"):
        check_name("a class", name)
        assert escaped(name) == name


BOMB = [1]
for _ in range(40):
    BOMB = [BOMB] * 9


@pytest.mark.parametrize(
    "value",
    [
        BOMB,
        "x" * 10**7,
        list(range(10**6)),
        dict.fromkeys(range(10**4), "y" * 999),
        10**5000,
        b"z" * 10**6,
        (BOMB, BOMB),
    ],
    ids=["bomb", "text", "list", "dict", "integer", "bytes", "tuple"],
)
def test_values_are_shown_in_part(value):
    assert len(shown(value)) <= 240
    for check in (lambda: check_choice("x", value, ("a",)), lambda: check_keys("x", [shown(value)], ("a",))):
        with pytest.raises(UserError) as caught:
            check()
        assert len(str(caught.value)) < 600


def test_message_of_json_holds_no_control_characters():
    with pytest.raises(UserError) as caught:
        parse_json('{"\\u001b[31m": 1, "\\u001b[31m": 2}', "x")
    assert "\x1b" not in str(caught.value)


def test_matplotlib_reads_no_formula():
    from matplotlib import pyplot as plt

    from report.drawing import literal, png

    for name in ("$\\frac{$", "a$b$c", "\\$", "$", "$$", "\x1b[31m$x$"):
        figure, axis = plt.subplots(figsize=(1, 1))
        axis.set_title(literal(name))
        axis.set_xlabel(literal(name))
        assert png(figure, 30)
