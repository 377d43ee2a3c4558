"""What the frozen parts say about every window, computed once and read back as memory maps (Sec. 3.3: the GFDM is
frozen).

Training at small scales spends nearly all of its time in frozen networks; with this cache it does not.
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
from tqdm import tqdm

from step3_defi.model import DeFI

FORMAT = 1


class WindowDataset(Protocol):
    """What the cache asks of a window set beyond a sample set's methods."""

    def __len__(self) -> int: ...
    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]: ...
    def text(self, index: int) -> str: ...
    def id(self, index: int) -> str: ...
    def action_chunk(self, index: int) -> Tensor: ...
    def fingerprint(self) -> str: ...


class CachedWindows:
    """A sample set like `windows`, with `frozen` in place of `views`."""

    def __init__(self, windows: WindowDataset, arrays: dict[str, np.ndarray], rows: Sequence[int]) -> None:
        self.windows, self.arrays, self.rows = windows, arrays, rows

    def __len__(self) -> int:
        return len(self.windows)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One window; `rng` is not used."""
        row = self.rows[index]
        frozen = {name: torch.from_numpy(np.array(array[row])) for name, array in self.arrays.items()}
        return {
            "id": self.windows.id(index),
            "frozen": frozen,
            "text": self.windows.text(index),
            "actions": self.windows.action_chunk(index),
        }


def cached(
    windows: WindowDataset, model: DeFI, folder: str | Path, *, parents: dict[str, str], batch_size: int = 32
) -> CachedWindows:
    """Build the cache of `windows` under `folder`, or go on building, or open it.

    parents: what identifies the weights of the frozen parts. A blind policy sees the same in every window of a
    sentence,
    so it keeps one row for each.
    """
    firsts, rows = _distinct(windows, model.blind)
    target = [model.pair_view_indices, model.pair_frames] if model.alignment_weight else None
    key = {
        "format": FORMAT,
        "parents": parents,
        "windows": windows.fingerprint(),
        "views": model.views,
        "seed": model.imagine_seed,
        "image_size": model.image_size,
        "blind": model.blind,
        "target": target,
        "precision": model.frozen_precision,
        "now": model.uses_present_tokens,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    done = Path(folder) / name
    if not done.is_dir():
        part = Path(folder) / f".{name}.part"
        _fill(part, windows, model, firsts, batch_size)
        (part / "key.json").write_text(json.dumps(key, indent=2) + "\n")
        os.replace(part, done)
    return CachedWindows(
        windows, {path.stem: np.load(path, mmap_mode="r") for path in sorted(done.glob("*.npy"))}, rows
    )


def _distinct(windows: WindowDataset, blind: bool) -> tuple[list[int], list[int]]:
    """Windows that need a row of their own, and the row of every window."""
    if not blind:
        return list(range(len(windows))), list(range(len(windows)))
    firsts: dict[str, int] = {}
    for index in range(len(windows)):
        firsts.setdefault(windows.text(index), index)
    row = {text: number for number, text in enumerate(firsts)}
    return list(firsts.values()), [row[windows.text(index)] for index in range(len(windows))]


def _check_disk_space(part: Path, count: int, size: int) -> None:
    """A map that outgrows the disk would end the process without a word; at full scale a window takes 42 MB."""
    free = shutil.disk_usage(part).free
    if count * size > free:
        raise ValueError(
            f"{part.parent}: the outputs of the frozen parts for {count} windows take {count * size / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB "
            f"are free; set cache=false, or name another place with cache_dir"
        )


@torch.inference_mode()
def _fill(part: Path, windows: WindowDataset, model: DeFI, firsts: list[int], batch_size: int) -> None:
    """Write the rows batch by batch; `progress` counts rows that are on the disk, so a killed build goes on from
    there."""
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
                None
                if key not in batch[0]
                else {
                    name: tensor.to(device)
                    for name, tensor in default_collate([sample[key] for sample in batch]).items()
                }
                for key in ("views", "futures")
            )
            seen = model.precompute(views, [sample["text"] for sample in batch], futures)
            if not arrays:
                _check_disk_space(part, len(firsts), sum(tensor[0].nbytes for tensor in seen.values()))
            for name, tensor in seen.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        part / f"{name}.npy", mode="w+", dtype=np.float16, shape=(len(firsts), *tensor.shape[1:])
                    )
                arrays[name][start : start + len(batch)] = tensor.cpu().numpy()
            start += len(batch)
            bar.update(len(batch))
            if start % (16 * batch_size) == 0 or start == len(firsts):
                for array in arrays.values():
                    array.flush()
                progress.with_suffix(".new").write_text(str(start))
                os.replace(progress.with_suffix(".new"), progress)
    progress.unlink()
    model.train(training)
