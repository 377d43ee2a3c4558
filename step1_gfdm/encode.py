"""Program: videos -> VAE latents, once, before training (Sec. 3.1).   python -m step1_gfdm.encode data=<video set>
[out=<set>]

Several processes (accelerate launch) share the files. What is there and whole is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import errno
import io
import logging
import pickle
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import video
from common.distributed import processes
from common.errors import MissingFileError, UserError
from common.files import atomic_path
from common.mixture import UnreadableSample
from common.precision import bf16_pays
from common.program import program
from common.video_set import (
    known_length,
    latent_target,
    num_cameras,
    read_annotation,
    video_path,
    write_latent_paths,
)
from step1_gfdm import vae

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_VIDEOS = 20  # videos before a share of bad ones says anything
log = logging.getLogger(__name__)


@dataclass
class _View:
    """One camera of one video: how many frames are there already or now, or its pictures, or why there are none."""

    target: Path
    there: int = 0
    new: bool = False
    images: Tensor | None = None
    problem: str = ""


@dataclass
class _Video:
    file: Path
    record: dict[str, Any]
    views: list[_View]
    problem: str = ""


class _Groups(Dataset):
    """Annotations in groups of a fixed make: the VAE's numbers may depend on what shares a batch, so a resumed run
    repeats its groups."""

    def __init__(
        self,
        data: Path,
        out: Path,
        files: list[Path],
        group: int,
        shape: tuple[int, int, int],
        image_size: int,
        aspect: str,
    ) -> None:
        self.data, self.out, self.shape, self.image_size, self.aspect = data, out, shape, image_size, aspect
        self.groups = [files[start : start + group] for start in range(0, len(files), group)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[_Video]:
        videos = [self._named(file) for file in self.groups[index]]
        if any(not view.there for each in videos for view in each.views):
            for each in videos:
                for number, view in enumerate(each.views):
                    self._decode(each, number, view)
        return videos

    def _named(self, file: Path) -> _Video:
        try:
            record = read_annotation(file)
            targets = [
                latent_target(self.out, self.out / file.relative_to(self.data), record, number)
                for number in range(num_cameras(file, record))
            ]
        except UnreadableSample as error:
            return _Video(file, {}, [], str(error))
        return _Video(file, record, [_View(target, _finished_frames(target, self.shape)) for target in targets])

    def _decode(self, each: _Video, number: int, view: _View) -> None:
        try:
            source = video_path(self.data, each.file, each.record, number)
            frames = video.read_frames(source)
            stated = known_length(each.record)
            if stated is not None and stated != len(frames):
                raise UnreadableSample(
                    str(source), f"has {len(frames)} frames, its annotation says {stated}; is the file truncated?"
                )
            view.images = video.resize(frames, self.image_size, self.aspect)
        except (UnreadableSample, video.VideoError) as error:
            view.problem = str(error)


def encode_set(
    data: Path,
    out: Path,
    latent_space: vae.FrozenVAE,
    *,
    image_size: int,
    annotation: str = "annotation",
    aspect: str = "squeeze",
    sample: bool = True,
    chunk_size: int = 64,
    group: int = 4,
    store: torch.dtype = torch.float32,
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
    max_unreadable_fraction: float = 1.0,
    rank: int = 0,
    world: int = 1,
) -> Counter:
    """Encode every camera of every video of a set, or of the first `limit` of each split; returns how many videos ended
    how.

    group: videos whose frames share the VAE's batches of `chunk`; workers: processes that decode ahead. Bad videos are
    counted and
    named; past `max_unreadable_fraction` of them the run stops.
    """
    files = [file for split in sorted((data / annotation).glob("*/")) for file in sorted(split.glob("*.json"))[:limit]]
    if not files:
        raise MissingFileError(
            f"{data / annotation}: no annotations of a video set here (data/README.md shows the layout)"
        )
    side = image_size // latent_space.factor
    groups = _Groups(data, out, files[rank::world], group, (latent_space.channels, side, side), image_size, aspect)
    counts: Counter = Counter()
    with tqdm(total=len(files[rank::world]), desc=f"encode {data.name}", unit="video", disable=rank != 0) as bar:
        for videos in DataLoader(groups, batch_size=None, num_workers=workers):
            _encode_group(videos, latent_space, sample=sample, chunk_size=chunk_size, store=store, seed=seed)
            for each in videos:
                _count(each, counts)
                lengths = [view.there for view in each.views if view.there]
                if lengths:
                    write_latent_paths(out, out / each.file.relative_to(data), each.record, min(lengths))
            bar.update(len(videos))
            _check_unreadable_fraction(counts, max_unreadable_fraction, out)
    return counts


def _encode_group(
    videos: list[_Video], latent_space: vae.FrozenVAE, *, sample: bool, chunk_size: int, store: torch.dtype, seed: int
) -> None:
    """All decoded views in common batches; each to its own file, unless a whole one is there."""
    decoded = [
        (each, number, view) for each in videos for number, view in enumerate(each.views) if view.images is not None
    ]
    if not decoded:
        return
    mean, deviation = latent_space.moments(
        torch.cat([view.images for _, _, view in decoded]) * 2 - 1, chunk_size=chunk_size
    )
    lengths = [len(view.images) for _, _, view in decoded]
    for (each, number, view), latents, spread in zip(
        decoded, mean.cpu().split(lengths), deviation.cpu().split(lengths)
    ):
        view.images = None
        if view.there:
            continue
        if sample:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{each.file.stem}/{number}".encode()) + seed)
            latents = vae.sample_gaussian(latents, spread, generator)
        if not torch.isfinite(latents).all():
            view.problem = f"{each.file}: camera {number}: the VAE gave NaN or infinity; use precision=fp32 or bf16"
            continue
        _save(latents.to(store), view.target)
        view.there, view.new = len(latents), True


def _save(latents: Tensor, target: Path) -> None:
    buffer = io.BytesIO()  # torch itself does not say that a disk is full
    torch.save(latents.clone(), buffer)
    try:
        with atomic_path(target) as part:
            part.write_bytes(buffer.getvalue())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{target}: the disk is full; free space and run the same command, finished latents are kept"
            ) from error
        raise


def _count(each: _Video, counts: Counter) -> None:
    if each.problem:
        counts["unreadable annotation"] += 1
        tqdm.write(f"skipped: {each.problem}")
    for view in each.views:
        if view.there:
            counts["encoded" if view.new else "already there"] += 1
        else:
            counts["unreadable video"] += 1
            tqdm.write(f"skipped: {view.problem}")


def _check_unreadable_fraction(counts: Counter, limit: float, out: Path) -> None:
    bad, total = counts["unreadable video"] + counts["unreadable annotation"], sum(counts.values())
    if total >= MIN_VIDEOS and bad / total > limit:
        raise UserError(
            f"{bad} of {total} videos are unreadable, more than max_unreadable_fraction={limit}: see the reasons above, or raise "
            "it; "
            f"what was encoded stays in {out}"
        )


def _finished_frames(path: Path, shape: tuple[int, int, int]) -> int:
    """Number of frames of a finished latent file of this shape, 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return 0
    return len(latents) if isinstance(latents, Tensor) and tuple(latents.shape[1:]) == shape else 0


@program("step1_encode")
def main(cfg: DictConfig) -> None:
    if cfg.precision not in (*PRECISIONS, "auto"):
        raise UserError(f"precision={cfg.precision}; use one of {', '.join(PRECISIONS)} or auto")
    if cfg.store not in ("fp32", "bf16"):
        raise UserError(f"store={cfg.store}; use fp32 (VPP) or bf16 (half the disk)")
    state = processes()
    precision = cfg.precision if cfg.precision != "auto" else "bf16" if bf16_pays(state.device) else "fp32"
    latent_space = vae.load(cfg.svd).to(state.device, PRECISIONS[precision])
    data = Path(cfg.videos)
    out = Path(cfg.out or data)
    counts = encode_set(
        data,
        out,
        latent_space,
        image_size=cfg.image_size,
        annotation=cfg.annotation,
        aspect=cfg.aspect,
        sample=cfg.sample,
        chunk_size=cfg.chunk_size,
        group=cfg.group,
        store=PRECISIONS[cfg.store],
        workers=cfg.workers,
        max_unreadable_fraction=cfg.max_unreadable_fraction,
        limit=cfg.limit,
        seed=cfg.seed,
        rank=state.process_index,
        world=state.num_processes,
    )
    log.info("process %d: %s", state.process_index, ", ".join(f"{n} {ending}" for ending, n in sorted(counts.items())))
    log.info("latents in %s", out)


if __name__ == "__main__":
    # `data` is also a config group, whose values Hydra would look up as files
    sys.argv[1:] = [re.sub(r"^data=", "videos=", argument) for argument in sys.argv[1:]]
    main()
