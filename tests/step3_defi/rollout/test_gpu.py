"""Which GPU simulators render on."""

from __future__ import annotations

import pytest
import torch

from step3_defi.rollout import gpu, handle
from step3_defi.rollout.messages import SequencesRequest
from step3_defi.rollout.simulators import SimulatorPool

FOUR = (0, 1, 2, 3, None)  # the last one is Mesa's


def both(number: int, *visible: str) -> dict[str, str]:
    names = ("EGL_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID", *visible)
    return dict.fromkeys(names, str(number))


@pytest.mark.parametrize(
    ("environment", "numbers", "added"),
    [
        ({}, FOUR, both(0)),
        ({"LOCAL_RANK": "2"}, FOUR, both(2)),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, FOUR, both(3, "CUDA_VISIBLE_DEVICES")),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "1, 2"}, FOUR, both(2, "CUDA_VISIBLE_DEVICES")),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, (None, None, 0, 1), both(3, "CUDA_VISIBLE_DEVICES")),
        ({"LOCAL_RANK": "1"}, (None, 1, 0), {"EGL_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "1"}),
        ({"LOCAL_RANK": "0"}, (None, 1, 0), {"EGL_VISIBLE_DEVICES": "2", "MUJOCO_EGL_DEVICE_ID": "0"}),
        ({"LOCAL_RANK": "2", "EGL_VISIBLE_DEVICES": "7"}, FOUR, {"MUJOCO_EGL_DEVICE_ID": "2"}),
        (
            {"LOCAL_RANK": "1", "MUJOCO_EGL_DEVICE_ID": "0", "CUDA_VISIBLE_DEVICES": "2,3"},
            FOUR,
            {"EGL_VISIBLE_DEVICES": "3"},
        ),
    ],
)
def test_each_rank_renders_on_its_gpu(
    environment: dict[str, str], numbers: tuple[int | None, ...], added: dict[str, str]
) -> None:
    assert gpu.egl_environment(environment, numbers) == added


@pytest.mark.parametrize(
    ("environment", "numbers"),
    [
        ({"LOCAL_RANK": "1"}, (None,)),  # Mesa alone, on a machine with GPUs or without
        ({"LOCAL_RANK": "1"}, ()),
        ({"LOCAL_RANK": "4"}, FOUR),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "GPU-8932f937,GPU-1"}, FOUR),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}, FOUR),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "5"}, (None,)),
    ],
)
def test_nothing_changes_where_egl_does_not_list_the_gpu(
    environment: dict[str, str], numbers: tuple[int | None, ...]
) -> None:
    assert gpu.egl_environment(environment, numbers) == {}


def test_a_machine_without_cuda_devices_lists_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert set(gpu.egl_cuda_indices()) <= {None}


@pytest.mark.parametrize("there", [True, False])
def test_simulators_are_told_where_there_is_a_gpu(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "egl_cuda_indices", lambda: FOUR)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for name, value in {
        "LOCAL_RANK": "3",
        "MUJOCO_EGL_DEVICE_ID": None,
        "EGL_VISIBLE_DEVICES": None,
        "CUDA_VISIBLE_DEVICES": None,
    }.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    env = {
        "_target_": "tests.step3_defi.rollout.rollout_fakes.FakeEnv",
        "chains": [[30]],
        "version": "egl ${oc.env:EGL_VISIBLE_DEVICES,none} ${oc.env:MUJOCO_EGL_DEVICE_ID,none}",
    }
    with SimulatorPool(env, count=1) as simulators:
        assert simulators.get_sequences(SequencesRequest(1, None, 1, 0)).world == "fake-D"
    assert simulators.versions["simulator"] == ("fake egl 3 3" if there else "fake egl none none")
