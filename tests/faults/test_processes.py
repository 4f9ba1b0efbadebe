"""Two processes: a lost one is named by the other, both stop at the same step, and a continuation is exact."""

import signal
import socket
import time

import pytest
from tasks import run_rank, same_results


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
