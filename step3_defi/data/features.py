"""A cache of what the frozen parts say about every window, computed once and read as memory maps (Sec. 3.3).

At small scales, training without it spends nearly all of its time in frozen networks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from common.errors import UserError
from common.files import write_text
from common.progress import tqdm
from step3_defi.model import DeFI

FORMAT = 2
FLUSH_EVERY = 16  # batches after which what was computed is safe on the disk


class WindowDataset(Protocol):
    """The methods of a window set that the cache uses."""

    def __len__(self) -> int: ...
    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]: ...
    def text(self, index: int) -> str: ...
    def id(self, index: int) -> str: ...
    def action_chunk(self, index: int) -> Tensor: ...
    def fingerprint(self) -> str: ...


class CachedWindows:
    """A sample set like `windows`, whose samples hold "encoded" in place of "views"; see contracts.PolicyBatch."""

    def __init__(self, windows: WindowDataset, arrays: dict[str, np.ndarray], rows: Sequence[int]) -> None:
        self.windows, self.arrays, self.rows = windows, arrays, rows

    def __len__(self) -> int:
        return len(self.windows)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A window as one sample; `rng` is not used."""
        row = self.rows[index]
        encoded = {name: torch.from_numpy(np.array(array[row])) for name, array in self.arrays.items()}
        return {
            "id": self.windows.id(index),
            "encoded": encoded,
            "text": self.windows.text(index),
            "actions": self.windows.action_chunk(index),
        }


def get_or_build_cache(
    windows: WindowDataset, model: DeFI, folder: str | Path, *, parents: dict[str, str], batch_size: int = 32
) -> CachedWindows:
    """Open the cache of `windows` in `folder`; build it, or finish building it, where that is needed.

    parents: part -> what identifies its weights. To a blind policy all windows of a sentence look alike, so its cache
    holds one row for each sentence. Raises UserError if the disk is too small.
    """
    firsts, rows = _distinct(windows, model.observation.blind)
    key = {
        "format": FORMAT,
        "parents": parents,
        "windows": windows.fingerprint(),
        "views": model.views,
        "seed": model.imagine_seed,
        "image_size": model.image_size,
        "blind": model.observation.blind,
        "targets": [model.pair_view_indices, model.pair_frames] if model.alignment.weight else None,
        "precision": model.observation.precision,
        "present_tokens": model.uses_present_tokens,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    finished = Path(folder) / name
    if not finished.is_dir():
        part = Path(folder) / f".{name}.part"
        _fill(part, windows, model, firsts, batch_size)
        (part / "key.json").write_text(json.dumps(key, indent=2) + "\n")
        os.replace(part, finished)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(finished.glob("*.npy"))}
    return CachedWindows(windows, arrays, rows)


def _distinct(windows: WindowDataset, blind: bool) -> tuple[list[int], list[int]]:
    """(indices of the windows that get a row in the cache, row of every window)."""
    if not blind:
        return list(range(len(windows))), list(range(len(windows)))
    firsts: dict[str, int] = {}
    for index in range(len(windows)):
        firsts.setdefault(windows.text(index), index)
    row = {text: number for number, text in enumerate(firsts)}
    return list(firsts.values()), [row[windows.text(index)] for index in range(len(windows))]


def _check_disk_space(part: Path, count: int, size: int) -> None:
    """Raise UserError if `count` rows of `size` bytes exceed the free disk space; at full scale a window takes 42 MB.

    A memory map that outgrows the disk would end the process without a message.
    """
    free = shutil.disk_usage(part).free
    if count * size > free:
        raise UserError(
            f"{part.parent}: the outputs of the frozen parts for {count} windows take {count * size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; set cache=false, or name another folder with cache_dir"
        )


@torch.inference_mode()
def _fill(part: Path, windows: WindowDataset, model: DeFI, firsts: list[int], batch_size: int) -> None:
    """Compute and write the rows of the windows `firsts`, batch by batch.

    The file `progress` counts the rows that are on the disk, so that a build that was killed continues there.
    """
    part.mkdir(parents=True, exist_ok=True)
    progress = part / "progress"
    start = int(progress.read_text()) if progress.is_file() else 0
    arrays: dict[str, np.ndarray] = (
        {path.stem: np.load(path, mmap_mode="r+") for path in part.glob("*.npy")} if start else {}
    )
    training, device = model.training, model.device
    model.eval()
    rng = np.random.default_rng(0)
    with tqdm(total=len(firsts), initial=start, desc="frozen features", unit="window", mininterval=1) as bar:
        while start < len(firsts):
            batch = [windows.sample(index, rng) for index in firsts[start : start + batch_size]]
            views, futures = (
                _to_device([sample[key] for sample in batch], device) if key in batch[0] else None
                for key in ("views", "futures")
            )
            encoded = model.precompute(views, [sample["text"] for sample in batch], futures)
            if not arrays:
                _check_disk_space(part, len(firsts), sum(tensor[0].nbytes for tensor in encoded.values()))
            for name, tensor in encoded.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        part / f"{name}.npy", mode="w+", dtype=np.float16, shape=(len(firsts), *tensor.shape[1:])
                    )
                arrays[name][start : start + len(batch)] = tensor.cpu().numpy()
            start += len(batch)
            bar.update(len(batch))
            if start % (FLUSH_EVERY * batch_size) == 0 or start == len(firsts):
                for array in arrays.values():
                    array.flush()
                write_text(progress, str(start))
    progress.unlink()
    model.train(training)


def _to_device(samples: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Collate the pictures of several samples and move them to a device: view name -> (B, ...)."""
    return {name: tensor.to(device) for name, tensor in default_collate(samples).items()}
