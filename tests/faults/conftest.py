"""One uninterrupted run of each task, and processes that start quickly, forked from one that has imported it all."""

import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_JIT", "0")  # Detectron2 scripts small functions on import, slowly
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from tasks import TASKS, Task


@pytest.fixture(params=TASKS)
def task(request, sample_data):
    return Task(request.param, sample_data)


@pytest.fixture(scope="session")
def _references(tmp_path_factory):
    return tmp_path_factory.mktemp("whole"), {}


@pytest.fixture
def whole(task, _references):
    """The folder of the run that nothing happened to; not to be changed."""
    root, done = _references
    if task.name not in done:
        task.train(root / task.name)
        done[task.name] = root / task.name
    return done[task.name]


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["classification.engine", "detection.engine", "segmentation.engine", "tasks"])
    return context
