"""Fixtures for all tests."""

import signal
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from guesses import CONTEXT

import pyengine
from pyengine._native import parallel

# All threads that a test asks for run, also where there are fewer CPUs: they meet in more ways.
parallel.usable_cpus = lambda: parallel.MOST_THREADS

# A shell starts what it runs in the background with Ctrl-C ignored, and Python then has no handler for it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, for whose text others guess."""
    config = {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": CONTEXT, "vocab_size": 300}
    return write_checkpoint(tmp_path_factory.mktemp("target"), config)


@pytest.fixture(params=["float32", "int8"])
def target(request: pytest.FixtureRequest, target_folder: Path) -> pyengine.Model:
    """The model of it."""
    return pyengine.load(target_folder, dtype=request.param, threads=2)
