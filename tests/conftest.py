"""Fixtures for all tests: data next to the checkout, and tiny stand-ins for third-party weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# threads that wait for a core in use by other programs made one test 50 times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from absl import logging as absl_logging
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project is run from its root, not installed
# absl, which tensorflow-datasets imports, closes the stderr of its import when Hydra configures logging, and during a
# test that is pytest's capture file
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real samples (see shared/data/README.md). Tests that need them are skipped where the folder is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared/data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny CLIP, T5, DINOv2 and SVD with random weights, saved in the hub's own format."""
    from common import standins

    folder = tmp_path_factory.mktemp("hub")
    standins.make_all(folder, seed=0)
    return folder


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The same seed for every test, and no precision left over from a loop of an earlier test."""
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state()
