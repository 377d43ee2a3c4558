"""Fixtures of step 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from common import artifact
from tests.step3_defi.parts import PARENT_CONFIGS, configure, write_calvin


@pytest.fixture
def calvin(tmp_path: Path) -> Path:
    """A small dataset in CALVIN's format."""
    return write_calvin(tmp_path / "calvin")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread: these models are too small for a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tree(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpts/, which holds stand-ins and both models untrained, and data/ with a small dataset."""
    root = tmp_path_factory.mktemp("tree")
    (root / "ckpts/hub").mkdir(parents=True)
    (root / "ckpts/hub/tiny").symlink_to(hub)
    for kind, program in PARENT_CONFIGS.items():
        config = OmegaConf.to_container(configure(program, f"paths.ckpts={root}/ckpts")[kind], resolve=True)
        own = {"svd": artifact.HERE} if kind == "gfdm" else {}
        artifact.save(instantiate(config), root / f"ckpts/{kind}/tiny", kind=kind, config={**config, **own})
    write_calvin(root / "data/demonstrations")
    return root
