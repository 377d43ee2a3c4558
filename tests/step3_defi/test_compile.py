"""torch.compile changes the speed, and actions by rounding only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from step1_gfdm import GFDM
from step1_gfdm.objective import EDM
from step3_defi import policy
from tests.step3_defi.parts import SENTENCES, build, wake
from tests.step3_defi.test_policy import get_obs

TEXT = ["open the drawer", "push the red block"]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def test_imagine_through_one_compiled_graph_is_the_same(hub: Path) -> None:
    """The graph is captured but not compiled, because generating code for this many layers takes minutes."""
    torch.manual_seed(0)
    gfdm = (
        GFDM(str(hub / "svd"), str(hub / "clip"), objective=EDM(), image_size=64, num_frames=4)
        .eval()
        .requires_grad_(False)
    )
    pictures, keys, graphs = torch.rand(2, 3, 64, 64) * 2 - 1, list(gfdm.state_dict()), CompileCounter()
    expected = [gfdm.imagine(pictures * scale, TEXT) for scale in (1, 0.5)]
    gfdm.compile_unet(backend=graphs, fullgraph=True, dynamic=False)
    for scale, truth in zip((1, 0.5), expected):
        torch.testing.assert_close(gfdm.imagine(pictures * scale, TEXT), truth, atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1 and graphs.op_count > 100
    assert list(gfdm.state_dict()) == keys and len(list(gfdm.parameters())) == len(set(gfdm.parameters()))


GENERATES = os.environ.get("DEFI_COMPILE") == "1" and shutil.which("g++") is not None


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not GENERATES, reason="generating code takes minutes and a C++ compiler; DEFI_COMPILE=1 tries it"
            ),
        ),
    ],
)
def test_a_loaded_policy_compiles_its_adapter_and_plans_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    def opened(*_: object) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build()
        wake(model)
        return model

    monkeypatch.setattr(policy.artifact, "load", opened)
    monkeypatch.setattr(policy, "find_parents", lambda *_: {})
    monkeypatch.setattr(
        policy, "compile_options", lambda device: {"backend": backend, "fullgraph": True, "dynamic": False}
    )
    plain, compiled = (policy.load(tmp_path, compile=wanted) for wanted in (False, True))
    assert compiled.model.adapter._compiled_call_impl is not None and plain.model.adapter._compiled_call_impl is None
    observations = [get_obs(0), get_obs(1)]
    assert np.allclose(
        compiled.predict_action_chunk(observations, SENTENCES),
        plain.predict_action_chunk(observations, SENTENCES),
        atol=1e-4,
    )


def test_graphs_are_replayed_on_a_gpu_only() -> None:
    assert policy.compile_options(torch.device("cpu"))["mode"] is None
    assert policy.compile_options(torch.device("cuda"))["mode"] == "reduce-overhead"
