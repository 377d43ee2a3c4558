"""Other people's checkpoints as flat dictionaries of tensors: .safetensors, and .ckpt, .pt, .bin as torch.save writes
them.

Nothing but tensors and builtins is ever unpickled. Ours are artifacts (common/artifact.py).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

NESTS = ("state_dict", "model")  # where Lightning, and the release's and VPP's policies, keep their tensors


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is, or does not fit a model."""


class _Blank:
    """Stands where a checkpoint holds an object of a foreign class; keeps nothing of it and runs nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _BlankDict:
    """Stands where the foreign class is a dictionary's: keeps the items, since torch sets items of its own kinds
    only."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_tensors(path: str | Path, *, skip_foreign: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by dotted name, on the CPU; a state_dict nested under NESTS is found, whatever else
    lies beside it is left out.

    A pickle that holds objects of other classes (Lightning's hyper-parameters, a policy's DictConfig) raises
    CheckpointError with their
    names. With `skip_foreign` blanks take their place, plain dictionaries that of dictionaries: their code is neither
    imported nor run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint is one .ckpt, .pt, .bin or .safetensors file")
    tree = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, skip_foreign)
    inner = tree
    while isinstance(inner, Mapping) and (
        nest := next((name for name in NESTS if isinstance(inner.get(name), Mapping)), None)
    ):
        inner = inner[nest]
    tensors = dict(_flat(inner)) if isinstance(inner, Mapping) else {}
    if not tensors:
        top = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
        raise CheckpointError(
            f"{path}: no tensors by name at its top, nor under {' or '.join(NESTS)}; it holds: {top or 'nothing'}"
        )
    return tensors


def check_import(path: str | Path, output_dir: str | Path, foreign: str, *, expected: str) -> None:
    """Refuse what a program that imports a checkpoint cannot do: a `foreign` that is no choice, an artifact in the way,
    no file."""
    if foreign not in ("refuse", "skip"):
        raise ValueError(f"foreign={foreign}: use refuse or skip")
    if (Path(output_dir) / "meta.json").is_file():
        raise FileExistsError(f"{output_dir} is an artifact already; choose another name=")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={path}: no such file; it is {expected}")


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    """A tensor's name after every (pattern, replacement) of `table` in order: a later line sees what an earlier one
    made."""
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def counted(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, int]:
    """Prefix -> how many numbers stand under it, where there are any."""
    found = {
        prefix: sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix))
        for prefix in prefixes
    }
    return {prefix: count for prefix, count in found.items() if count}


def state_dict_mismatch(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Why `tensors` are not exactly the state of `model`, every key named on one line; empty where they are."""
    own = model.state_dict()
    wrong = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in sorted(own.keys() & tensors.keys())
            if own[key].shape != tensors[key].shape
        ],
    }
    return "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in wrong.items() if names)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from error


def _pickled(path: Path, skip_foreign: bool) -> Any:
    zipped = zipfile.is_zipfile(path)  # torch.save's format since 1.6: the only one that can be mapped and listed
    try:
        foreign = sorted(get_unsafe_globals_in_checkpoint(path)) if zipped else []
        if foreign and not skip_foreign:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(foreign)} beside its tensors, and only tensors and builtins are "
                "unpickled; "
                "read past them, their code neither imported nor run, with foreign=skip"
            )
        return _past(path, foreign, zipped)
    except CheckpointError:
        raise
    except (
        LookupError,
        TypeError,
    ) as error:  # torch's unpickler stumbles over what is no pickle, or over a state of no common form
        raise CheckpointError(f"{path}: not readable as a checkpoint of tensors ({error!r})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        said = str(error).rpartition("WeightsUnpickler error:")[2]  # what stands before is torch's advice
        lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
        reason = (
            next((line for line in lines if "GLOBAL" in line), lines[0]).split(" was not an allowed")[0].rstrip(".")
        )
        hint = (
            "; where you trust it, save its state_dict alone as .safetensors"
            if isinstance(error, pickle.UnpicklingError)
            else ""
        )
        raise CheckpointError(f"{path}: not readable as a checkpoint of tensors ({reason}){hint}") from error


def _past(path: Path, foreign: list[str], zipped: bool) -> Any:
    """What a pickle holds, blanks in place of `foreign` classes. Only in reading does it show which of them are
    dictionaries."""
    blanks = {
        name: type(name.rpartition(".")[2], (_Blank,), {"__module__": name.rpartition(".")[0]}) for name in foreign
    }
    while True:
        try:
            with safe_globals([(blank, name) for name, blank in blanks.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
        except pickle.UnpicklingError as error:
            filled = next(
                (name for name, blank in blanks.items() if "SETITEM" in str(error) and str(blank) in str(error)), None
            )
            if filled is None:
                raise
            blanks[filled] = _BlankDict


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
