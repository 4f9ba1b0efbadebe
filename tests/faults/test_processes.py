"""Two processes: a lost one is named by the other, both stop at the same step, and a continuation is exact."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from tasks import ROOT, run_rank, same_results

from backbones.training import processes as run_processes
from backbones.utils.errors import UserError


def together(processes, task, folder, resume=False, faults=(None, None)):
    """Runs two ranks; their exit codes, logs, and the seconds from the end of one to the end of the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder.parent / f"{folder.name}-{rank}.log" for rank in range(2)]
    ranks = [
        processes.Process(target=run_rank, args=(task, folder, resume, rank, port, faults[rank], logs[rank]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 180
    while len(ends) < 2 and time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            if rank not in ends and process.exitcode is not None:
                ends[rank] = time.monotonic()
        time.sleep(0.05)
    for process in ranks:
        process.kill()
    assert len(ends) == 2, [log.read_text() for log in logs]
    return [p.exitcode for p in ranks], [log.read_text() for log in logs], abs(ends[0] - ends[1])


@pytest.fixture(scope="session")
def _pairs(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs"), {}


@pytest.fixture
def pair(task, processes, _pairs):
    """The folder of a run of two processes that nothing happened to."""
    root, done = _pairs
    if task.name not in done:
        codes, logs, _ = together(processes, task, root / task.name)
        assert codes == [0, 0], logs
        done[task.name] = root / task.name
    return done[task.name]


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_lost_rank_is_named_within_30_seconds_and_the_run_continues(task, pair, processes, tmp_path, lost):
    folder, faults = tmp_path / "run", [None, None]
    faults[lost] = (signal.SIGKILL, 5)
    codes, logs, seconds = together(processes, task, folder, faults=faults)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 2, logs
    assert f"error: rank {lost} (process " in logs[1 - lost] and "was lost" in logs[1 - lost]
    assert "--resume" in logs[1 - lost]
    assert seconds < 30
    codes, logs, _ = together(processes, task, folder, resume=True)
    assert codes == [0, 0], logs
    same_results(folder, pair)


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_one_rank_that_is_asked_to_stop_stops_both_at_one_step(task, pair, processes, tmp_path, told):
    folder, faults = tmp_path / "run", [None, None]
    faults[told] = (signal.SIGTERM, 3)
    codes, logs, _ = together(processes, task, folder, faults=faults)
    assert codes == [143, 143], logs
    assert all("stopped after step 3," in log for log in logs)
    codes, logs, _ = together(processes, task, folder, resume=True)
    assert codes == [0, 0], logs
    same_results(folder, pair)


@pytest.fixture
def far(monkeypatch):
    """A second process on another machine, whose end nobody here can see."""

    def gather(peers, own):
        peers[:] = [own, run_processes._Peer(1, "elsewhere", 7)]

    monkeypatch.setattr(run_processes, "world_size", lambda: 2)
    monkeypatch.setattr(run_processes.dist, "all_gather_object", gather)


def test_a_rank_that_is_lost_on_another_machine_is_named(far):
    message = r"rank 1 \(process 7 on elsewhere\) may be lost.*Continue with: again"
    with pytest.raises(UserError, match=message), run_processes.naming_lost_ranks("again"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5")


def test_an_error_of_this_process_is_not_blamed_on_another_machine(far):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), run_processes.naming_lost_ranks("again"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.slow
def test_the_processes_that_num_gpus_starts_stop_with_their_parent(sample_data, tmp_path):
    """``train_net.py --num-gpus 2`` waits for two processes of its own, which a SIGTERM to it must reach."""
    data, log = sample_data / "detection", (tmp_path / "log").open("w+")
    words = [sys.executable, str(ROOT / "tools/train_net.py"), "--config", str(ROOT / "detection/vitdet_softmax.yaml")]
    words += ["--size", "nano", "--num-gpus", "2", "--output", str(tmp_path / "run"), "SOLVER.EPOCHS", "500.0"]
    words += ["DATASETS.TRAIN_JSON", f"{data}/annotations/train.json", "DATASETS.TRAIN_IMAGES", f"{data}/train"]
    words += ["DATASETS.TEST_JSON", f"{data}/annotations/val.json", "DATASETS.TEST_IMAGES", f"{data}/val"]
    words += ["INPUT.IMAGE_SIZE", "64", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.LOG_STEPS", "1", "MODEL.VIT.depth", "2"]
    words += ["MODEL.VIT.global_blocks", "[1]", "DATALOADER.NUM_WORKERS", "0"]
    run = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while "step 2/" not in (tmp_path / "log").read_text() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.2)
    run.terminate()
    assert run.wait(60) == 143, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("stopped after step") == 2
    assert (tmp_path / "run" / "checkpoint.pth").is_file()
