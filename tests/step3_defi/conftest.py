"""Fixtures of step 3."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.step3_defi.parts import write_calvin


@pytest.fixture
def calvin(tmp_path: Path) -> Path:
    """A small dataset in CALVIN's format."""
    return write_calvin(tmp_path / "calvin")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """These models are so small that a second thread only waits."""
    torch.set_num_threads(1)
