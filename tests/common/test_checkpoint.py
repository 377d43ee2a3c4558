"""Foreign checkpoints: every nesting and suffix is read, only tensors are unpickled, every failure is one line."""

from __future__ import annotations

import argparse
import os
import shutil
from collections import OrderedDict, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.checkpoint import CheckpointError, read_tensors, state_dict_mismatch

TENSORS = {"lam.a": torch.arange(6.0).view(2, 3), "lam.b.weight": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda t: {"state_dict": OrderedDict(t), "epoch": 3, "hyper_parameters": {"dim": 8}},
        lambda t: {"model": t, "args": {"x": [1, None]}},
        lambda t: {"model": {"state_dict": t}},
    ],
)
def test_tensors_are_found_in_every_nesting(wrap: Any, suffix: str, tmp_path: Path) -> None:
    torch.save(wrap(TENSORS), tmp_path / f"x{suffix}")
    found = read_tensors(tmp_path / f"x{suffix}")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


def test_safetensors_legacy_pickles_parameters_and_modules_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(
        {"model": {"lam": {"a": nn.Parameter(TENSORS["lam.a"]), "b": {"weight": TENSORS["lam.b.weight"]}}}},
        tmp_path / "deep.pt",
    )
    for name in ("x.safetensors", "old.pt", "deep.pt"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == TENSORS.keys() and all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)
        assert not any(tensor.requires_grad for tensor in found.values())


class Trap:
    """An object that calls a function where it is unpickled."""

    def __init__(self, function: Any, *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return self.call


def test_foreign_objects_are_named_and_skipped_only_when_asked(tmp_path: Path) -> None:
    held = {"optimizer": argparse.Namespace(lr=1e-4), "share": Fraction(1, 2)}
    torch.save({"state_dict": TENSORS, "hyper_parameters": held}, tmp_path / "x.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"x.ckpt: holds objects of argparse.Namespace, fractions.Fraction beside its .*foreign=skip, which .*$",
    ) as caught:
        read_tensors(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)
    found = read_tensors(tmp_path / "x.ckpt", skip_foreign=True)
    assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


class Settings(dict):
    """A dictionary of another class."""

    built = 0

    def __new__(cls, *_: Any) -> Settings:
        Settings.built += 1
        return super().__new__(cls)


class Ordered(OrderedDict):
    """A dictionary class with attributes in addition to its items."""


class Slotted(dict):
    """A dictionary class whose state torch's unpickler cannot restore."""

    __slots__ = ("note",)


class Rows(list):
    """A list of another class."""


@pytest.mark.parametrize("make", [lambda items: defaultdict(list, items), Settings, Ordered])
def test_dictionaries_of_other_classes_are_read_as_plain_ones(make: Any, tmp_path: Path) -> None:
    held = make({"lr": 1e-4, "rows": make({})})
    if isinstance(held, Ordered):
        held.note = "x"
    torch.save({"state_dict": make(TENSORS), "hyper_parameters": held, "share": Fraction(1, 2)}, tmp_path / "x.ckpt")
    with pytest.raises(
        CheckpointError, match=r"holds objects of .*(defaultdict|Settings|Ordered).*foreign=skip, which .*$"
    ):
        read_tensors(tmp_path / "x.ckpt")
    built = Settings.built
    found = read_tensors(tmp_path / "x.ckpt", skip_foreign=True)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)
    assert Settings.built == built, "foreign code ran"


def test_what_cannot_be_skipped_is_named(tmp_path: Path) -> None:
    slotted = Slotted(a=1)
    slotted.note = "x"
    for held, message in (
        (Rows([1]), r"\(Can only append to lists, but got <class '.*test_checkpoint.Rows'>\)"),
        (slotted, r"\(TypeError\(.*\)"),
    ):
        torch.save({"state_dict": TENSORS, "hyper_parameters": held}, tmp_path / "x.ckpt")
        with pytest.raises(
            CheckpointError, match=f"x.ckpt: not readable as a checkpoint of tensors {message}"
        ) as caught:
            read_tensors(tmp_path / "x.ckpt", skip_foreign=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("function, blocked", [(os.mkdir, True), (shutil.copytree, False)])
def test_no_code_of_a_checkpoint_runs(function: Any, blocked: bool, zipped: bool, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    trap = (
        Trap(function, str(tmp_path / "to"))
        if blocked
        else Trap(function, str(tmp_path / "from"), str(tmp_path / "to"))
    )
    torch.save({"model": TENSORS, "args": trap}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=function.__name__):
        read_tensors(tmp_path / "x.pt")
    if zipped and not blocked:
        assert read_tensors(tmp_path / "x.pt", skip_foreign=True).keys() == TENSORS.keys()
    else:  # torch never accepts system modules, and the classes in old pickles cannot be listed
        with pytest.raises(CheckpointError, match=f"{function.__name__}.*save its state_dict alone"):
            read_tensors(tmp_path / "x.pt", skip_foreign=True)
    assert not (tmp_path / "to").exists()


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(TENSORS, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("hello world")
    torch.save({"epoch": 3, "loops": {}}, tmp_path / "bare.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in {
        "torn.safetensors": "not readable as safetensors",
        "empty.pt": "not readable",
        "cut.pt": "not readable",
        "text.pt": "not readable",
        "none.pt": "no such file",
        "bare.ckpt": "no tensors by name .*it holds: epoch, loops",
        "list.pt": "no tensors by name .*it holds: list",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {message}") as caught:
            read_tensors(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_mismatch_names_every_key() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(15)))
    state = model.state_dict()
    assert state_dict_mismatch(model, state) == ""
    state.update({f"extra.{i}": torch.ones(1) for i in range(12)}, **{"3.bias": torch.ones(3)})
    for i in range(4, 15):
        del state[f"{i}.weight"]
    found = state_dict_mismatch(model, state)
    assert found.startswith("11 missing: 10.weight, ") and "; 12 unexpected: extra.0, " in found
    assert found.endswith("; 1 of another shape: 3.bias (3,) for (2,)")
    assert (
        all(f" {i}.weight" in found for i in range(4, 15))
        and all(f"extra.{i}" in found for i in range(12))
        and "\n" not in found
    )
