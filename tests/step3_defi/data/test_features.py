from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.mixture import collate
from step3_defi.data import features
from step3_defi.data.dataset import CalvinWindows
from tests.step3_defi.parts import build

RNG = np.random.default_rng(0)
PARENTS = {"gfdm": "a", "gidm": "b"}


def windows(root: Path, **changes) -> CalvinWindows:
    return CalvinWindows(root, "all", image_size=16, frame_stride=4, **changes)


def test_cached_samples_train_as_uncached_ones(calvin: Path, tmp_path: Path) -> None:
    model, plain = build(), windows(calvin)
    cached = features.get_or_build_cache(plain, model, tmp_path, parents=PARENTS, batch_size=5)
    assert len(cached) == len(plain) and not model.gfdm.module.training
    picks = [0, 7, len(plain) - 1]
    a, b = collate([plain.sample(i, RNG) for i in picks]), collate([cached.sample(i, RNG) for i in picks])
    assert (
        a["id"] == b["id"] and a["text"] == b["text"] and torch.equal(a["actions"], b["actions"]) and "views" not in b
    )
    losses = []
    for batch in (a, b):
        torch.manual_seed(0)
        losses.append(model(batch)["loss"])
    assert torch.isclose(*losses, rtol=2e-3)


def test_a_disk_that_is_too_small_is_one_line(calvin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match="for 24 windows take 0.0 GB.*cache=false"):
        features.get_or_build_cache(windows(calvin), build(), tmp_path, parents=PARENTS)
    assert not list(tmp_path.glob("*/*.npy")) and not list(tmp_path.glob(".*/*.npy"))


def test_built_once_and_anew_when_anything_changes(calvin: Path, tmp_path: Path) -> None:
    model = build()
    folder = tmp_path / "cache"
    features.get_or_build_cache(windows(calvin), model, folder, parents=PARENTS)
    calls = model.gfdm.module.calls
    features.get_or_build_cache(windows(calvin), model, folder, parents=PARENTS)
    assert model.gfdm.module.calls == calls
    for change in (
        {"parents": {"gfdm": "c", "gidm": "b"}},
        {"windows": windows(calvin, fraction=0.5)},
        {"model": build(**{"observation.imagine_seed": 1})},
        {"model": build(**{"observation.views": ("static",)})},
    ):
        features.get_or_build_cache(
            **{"windows": windows(calvin), "model": model, "folder": folder, "parents": PARENTS, **change}
        )
    assert len(list(folder.iterdir())) == 5


def test_a_killed_build_goes_on(calvin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = build(), windows(calvin)
    whole = features.get_or_build_cache(plain, model, tmp_path / "whole", parents=PARENTS, batch_size=1)
    precompute, calls = model.precompute, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return precompute(*arguments)

    monkeypatch.setattr(model, "precompute", dies)
    with pytest.raises(KeyboardInterrupt):
        features.get_or_build_cache(plain, model, tmp_path / "killed", parents=PARENTS, batch_size=1)
    again = features.get_or_build_cache(plain, model, tmp_path / "killed", parents=PARENTS, batch_size=1)
    assert len(calls) == 20 + len(plain) - 16  # what was flushed is not computed twice
    for name, array in whole.arrays.items():
        assert np.array_equal(array, again.arrays[name]), name
    assert not list((tmp_path / "killed").glob(".*"))


def test_blind_keeps_one_row_a_sentence(calvin: Path, tmp_path: Path) -> None:
    model, plain = build(**{"observation.blind": True}), windows(calvin)
    cached = features.get_or_build_cache(plain, model, tmp_path, parents=PARENTS)
    assert len(cached.arrays["present_tokens"]) == 2
    wanted = model.precompute({n: v[None] for n, v in plain.sample(9, RNG)["views"].items()}, [plain.text(9)])
    assert np.array_equal(cached.sample(9, RNG)["encoded"]["features"], wanted["features"][0])
