"""CALVIN's dataset as its authors publish it, read and checked (Sec. 4.2; envs.record writes the same format).

<root>/<folder>/episode_0000123.npz                    one frame: rgb_static, rgb_gripper, rel_actions, ...
<root>/<folder>/ep_start_end_ids.npy                   (n, 2) first and last frame of every recording, inclusive
<root>/<folder>/scene_info.npy                         {name of a scene: (first, last) frame}; optional
<root>/<folder>/lang_annotations/auto_lang_ann.npy     {"language": {"ann", "task"}, "info": {"indx": [(start, end)]}}
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError

# What a pickled numpy array of builtin containers needs, under numpy 1 and 2. All other globals are refused, because
# a pickle from outside could run any code.
ADMITTED = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
}
ADMITTED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
KEYS = {"static": "rgb_static", "gripper": "rgb_gripper"}


class CalvinFormatError(UserError):
    """A file of the dataset is missing, or is not as CALVIN publishes it."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only numpy arrays and builtin containers are admitted"
            )
        return super().find_class(module, name)


@dataclass(frozen=True)
class Annotation:
    """One sentence and the frames that it describes, first and last inclusive."""

    start: int
    end: int
    text: str
    task: str


def load_npy(path: str | Path) -> Any:
    """Read an .npy file. A 0-d object array is unwrapped. Raises CalvinFormatError.

    Pickled objects are accepted only where they consist of numpy arrays and builtin containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CalvinFormatError(f"{path} is missing; expected the layout of CALVIN's published dataset")
    try:
        with path.open("rb") as stream:
            array = _read_array(stream)
    except (
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:
        raise CalvinFormatError(f"{path} cannot be read: {error}") from error
    return array.item() if array.dtype == object and array.ndim == 0 else array


def _read_array(stream: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise ValueError(f"npy version {version} is not known")
    _, _, dtype = read_header(stream)
    if dtype.hasobject:
        array = _Restricted(stream).load()
        if not isinstance(array, np.ndarray):
            raise ValueError(f"holds a {type(array).__name__}, not an array")
        return array
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


def read_frame(folder: Path, frame: int, keys: list[str]) -> dict[str, np.ndarray]:
    """The arrays `keys` of one frame's npz; images and actions are checked. Raises CalvinFormatError.

    Only these members of the archive are decompressed.
    """
    path = frame_path(folder, frame)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise CalvinFormatError(f"{path}: has no {missing[0]!r}; it holds {sorted(archive.files)}")
            arrays = {key: archive[key] for key in keys}
    except FileNotFoundError as error:
        raise CalvinFormatError(
            f"{path} is missing; the annotations or ep_start_end_ids.npy name frame {frame}"
        ) from error
    except CalvinFormatError:
        raise
    # numpy raises ValueError for a file that is no zip archive, and for pickled objects
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        raise CalvinFormatError(f"{path}: truncated or damaged ({error})") from error
    for key, array in arrays.items():
        _check(path, key, array)
    return arrays


def _check(path: Path, key: str, array: np.ndarray) -> None:
    if key in KEYS.values() and (array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size):
        raise CalvinFormatError(f"{path}: {key} has shape {array.shape} of {array.dtype}, expected (H, W, 3) of uint8")
    if key == "rel_actions" and (
        array.shape != (7,) or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all()
    ):
        raise CalvinFormatError(
            f"{path}: rel_actions has shape {array.shape} of {array.dtype}, expected 7 finite numbers"
        )


def frame_path(folder: Path, frame: int) -> Path:
    """The file of a frame, whose number has seven digits."""
    return folder / f"episode_{frame:07d}.npz"


def read_recordings(folder: Path) -> np.ndarray:
    """(n, 2) first and last frame of every recording, sorted. Raises CalvinFormatError."""
    spans = np.atleast_2d(load_npy(folder / "ep_start_end_ids.npy"))
    if (
        spans.ndim != 2
        or spans.shape[1] != 2
        or not np.issubdtype(spans.dtype, np.integer)
        or (spans[:, 0] > spans[:, 1]).any()
    ):
        raise CalvinFormatError(
            f"{folder / 'ep_start_end_ids.npy'}: expected integer rows of first <= last, got shape {spans.shape}, "
            f"{spans.dtype}"
        )
    return spans[np.argsort(spans[:, 0])].astype(np.int64)


def read_scenes(folder: Path) -> dict[str, tuple[int, int]]:
    """Name of a scene -> its first and last frame; empty where the folder has no scene_info.npy."""
    path = folder / "scene_info.npy"
    content = load_npy(path) if path.is_file() else {}
    try:
        return {str(name): (int(first), int(last)) for name, (first, last) in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CalvinFormatError(
            f"{path}: expected a dictionary of scenes and their first and last frames ({error})"
        ) from error


def scene_of(frame: int, scenes: Mapping[str, tuple[int, int]]) -> str | None:
    """The name of the scene that a frame belongs to, None where it is not known."""
    return next((name for name, (first, last) in scenes.items() if first <= frame <= last), None)


def read_annotations(
    folder: Path, recordings: np.ndarray, lang_folder: str = "lang_annotations"
) -> list[tuple[Annotation, int]]:
    """Every annotation and the row in `recordings` of the recording that contains it, in the order of the file.

    Raises CalvinFormatError.
    """
    path = folder / lang_folder / "auto_lang_ann.npy"
    content = load_npy(path)
    try:
        texts, spans = list(content["language"]["ann"]), list(content["info"]["indx"])
        tasks = list(content["language"].get("task", [""] * len(texts)))
    except (TypeError, KeyError, IndexError) as error:
        raise CalvinFormatError(f"{path}: expected language/ann and info/indx, missing {error}") from error
    if not texts or not len(texts) == len(spans) == len(tasks):
        raise CalvinFormatError(
            f"{path}: {len(texts)} sentences, {len(tasks)} tasks and {len(spans)} spans do not belong together"
        )
    found = []
    for number, (text, task, (start, end)) in enumerate(zip(texts, tasks, spans)):
        row = int(np.searchsorted(recordings[:, 0], start, side="right")) - 1
        if row < 0 or not start <= end <= recordings[row, 1]:
            raise CalvinFormatError(
                f"{path}: annotation {number} ({text!r}) spans frames {start}..{end}, "
                f"past the end of any recording in ep_start_end_ids.npy"
            )
        found.append((Annotation(int(start), int(end), str(text), str(task)), row))
    return found
