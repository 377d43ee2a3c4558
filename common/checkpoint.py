"""Checkpoints of other projects as flat dictionaries of tensors: .safetensors, and .ckpt, .pt, .bin of torch.save.

Nothing but tensors and builtins is ever unpickled. This project stores its own models as artifacts (common.artifact).
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

from common.errors import MissingFileError, OutputExistsError, UserError

NESTS = ("state_dict", "model")  # the keys under which Lightning, the release and VPP keep their tensors


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit a model."""


class _Blank:
    """Replaces an object of a foreign class in a checkpoint. It keeps nothing of it and runs none of its code."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _BlankDict:
    """Replaces an object of a foreign dictionary class and keeps its items.

    It creates an OrderedDict, because torch's unpickler sets items of its own dictionary types only.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_tensors(path: str | Path, *, skip_foreign: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by dotted name, on the CPU. Raises CheckpointError.

    A state_dict nested under NESTS is found; everything else in the file is left out. A pickle that holds objects of
    other classes (Lightning's hyper-parameters, a policy's DictConfig) is refused, and the error names the classes.
    With `skip_foreign`, empty objects replace them, and plain dictionaries replace their dictionaries: code of these
    classes is neither imported nor run.
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
    """Check the options of a program that imports a checkpoint. `expected` says what the file at `path` should be.

    Raises UserError for an unknown choice of `foreign`, for an output folder that holds an artifact, and for a missing
    file.
    """
    if foreign not in ("refuse", "skip"):
        raise UserError(f"foreign={foreign}: use refuse or skip")
    if (Path(output_dir) / "meta.json").is_file():
        raise OutputExistsError(f"{output_dir} is an artifact already; choose another name=")
    if not Path(path).is_file():
        raise MissingFileError(f"path={path}: no such file; it is {expected}")


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    """`name` after the (pattern, replacement) pairs of `table`, applied one after the other."""
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def counted(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, int]:
    """Prefix -> number of weights in the tensors whose names begin with it; prefixes without any are left out."""
    found = {
        prefix: sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix))
        for prefix in prefixes
    }
    return {prefix: count for prefix, count in found.items() if count}


def state_dict_mismatch(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Why `tensors` are not exactly the state of `model`: one line that names every key. Empty where they are."""
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
    zipped = zipfile.is_zipfile(path)  # the format of torch.save since 1.6; only it can be memory-mapped and listed
    try:
        foreign = sorted(get_unsafe_globals_in_checkpoint(path)) if zipped else []
        if foreign and not skip_foreign:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(foreign)} beside its tensors, and only tensors and builtins are "
                "unpickled; skip them with foreign=skip, which neither imports nor runs their code"
            )
        return _load_without(path, foreign, zipped)
    except CheckpointError:
        raise
    # torch's unpickler raises these for a file that is no pickle, and for objects with a state of a rare form
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint of tensors ({error!r})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        message = str(error).rpartition("WeightsUnpickler error:")[2]  # the part before is advice on torch.load
        lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
        reason = (
            next((line for line in lines if "GLOBAL" in line), lines[0]).split(" was not an allowed")[0].rstrip(".")
        )
        hint = (
            "; if you trust the file, save its state_dict alone as .safetensors"
            if isinstance(error, pickle.UnpicklingError)
            else ""
        )
        raise CheckpointError(f"{path}: not readable as a checkpoint of tensors ({reason}){hint}") from error


def _load_without(path: Path, foreign: list[str], zipped: bool) -> Any:
    """What a pickle holds, with _Blank objects in place of the `foreign` classes.

    Which of them are dictionaries shows only while reading: then the reading starts again with _BlankDict for that one.
    """
    blanks = {
        name: type(name.rpartition(".")[2], (_Blank,), {"__module__": name.rpartition(".")[0]}) for name in foreign
    }
    while True:
        try:
            with safe_globals([(blank, name) for name, blank in blanks.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
        except pickle.UnpicklingError as error:
            dictionary = next(
                (name for name, blank in blanks.items() if "SETITEM" in str(error) and str(blank) in str(error)), None
            )
            if dictionary is None:
                raise
            blanks[dictionary] = _BlankDict


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
