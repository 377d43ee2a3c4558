"""Shared fixtures: the data that lies beside the checkout, and tiny stand-ins for third-party weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that spin for a core taken by others made one test 50 times slower

import pytest
import torch
from absl import logging as absl_logging
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project is run from its root, not installed
# absl (below tensorflow-datasets) closes the stream it met at import whenever Hydra sets logging up; here that is
# pytest's capture file
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real samples (see shared/data/README.md); tests that need them skip where the folder is absent."""
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
    """The same seed for every test, and no precision left over from a loop that ran before in this process."""
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state()
