"""Encode the videos of a video set into latents of SVD's VAE, once, before the forward model is trained (Sec. 3.1).

The latents are written beside the videos, or with `out` to a set of their own. Several processes (`accelerate launch`)
share the videos. Complete latent files are skipped, so a run that was stopped goes on where it was.

Examples:
    python -m step1_gfdm.encode scale=tiny videos=data/playtable/A/videos_set out=data/playtable/A/latents_set
    scripts/step1_prepare_data_latent.sh scale=full videos=data/opensource_robotdata/bridge precision=auto
"""

from __future__ import annotations

import io
import logging
import pickle
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import video
from common.distributed import processes
from common.errors import MissingFileError, UnreadableSample, UserError
from common.files import atomic_path
from common.image_range import normalize
from common.precision import bf16_pays
from common.program import program
from common.progress import tqdm
from common.video_set import (
    known_length,
    latent_target,
    num_cameras,
    read_annotation,
    video_path,
    write_latent_paths,
)
from step1_gfdm import vae as svd_vae
from step1_gfdm.bad_input import MIN_TRIED, check_unreadable_fraction, explain_full_disk

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger(__name__)


@dataclass
class _Camera:
    """One camera of an episode and the state of its latents.

    length: number of frames of a complete latent file at `target`, 0 where there is none. encoded: this run wrote it.
    images: the decoded video (T, 3, size, size) in [0, 1]. problem: why there are no latents.
    """

    target: Path
    length: int = 0
    encoded: bool = False
    images: Tensor | None = None
    problem: str = ""


@dataclass
class _Episode:
    """An annotation file with its content and cameras, or the problem with it."""

    file: Path
    record: dict[str, Any]
    cameras: list[_Camera]
    problem: str = ""


class _EpisodeGroups(Dataset):
    """Episodes in fixed groups that share the VAE's batches.

    The VAE's result may depend on what else is in a batch. A resumed run therefore decodes a group as a whole, even
    where only one of its latent files is missing.
    """

    def __init__(
        self,
        root: Path,
        out: Path,
        files: list[Path],
        *,
        group_size: int,
        latent_shape: tuple[int, int, int],
        image_size: int,
        aspect: str,
    ) -> None:
        self.root, self.out = root, out
        self.latent_shape, self.image_size, self.aspect = latent_shape, image_size, aspect
        self.groups = [files[start : start + group_size] for start in range(0, len(files), group_size)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[_Episode]:
        episodes = [self._read(file) for file in self.groups[index]]
        if not all(camera.length for episode in episodes for camera in episode.cameras):
            for episode in episodes:
                for number, camera in enumerate(episode.cameras):
                    self._decode(episode, number, camera)
        return episodes

    def _read(self, file: Path) -> _Episode:
        try:
            record = read_annotation(file)
            targets = [
                latent_target(self.out, self.out / file.relative_to(self.root), record, number)
                for number in range(num_cameras(file, record))
            ]
        except UnreadableSample as error:
            return _Episode(file, {}, [], str(error))
        return _Episode(file, record, [_Camera(path, _finished_length(path, self.latent_shape)) for path in targets])

    def _decode(self, episode: _Episode, number: int, camera: _Camera) -> None:
        try:
            path = video_path(self.root, episode.file, episode.record, number)
            frames = video.read_frames(path)
            length = known_length(episode.record)
            if length is not None and length != len(frames):
                raise UnreadableSample(
                    str(path), f"has {len(frames)} frames, its annotation says {length}; the file may be truncated"
                )
            camera.images = video.resize(frames, self.image_size, self.aspect)
        except (UnreadableSample, video.VideoError) as error:
            camera.problem = str(error)


def encode_set(
    root: Path,
    out: Path,
    vae: svd_vae.FrozenVAE,
    *,
    image_size: int,
    annotation: str = "annotation",
    aspect: str = "squeeze",
    sample_posterior: bool = True,
    chunk_size: int = 64,
    group_size: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
    max_unreadable_fraction: float = 1.0,
    rank: int = 0,
    world: int = 1,
) -> Counter:
    """Encode every camera of every video of the set `root` into the set `out`, those of process `rank`.

    annotation: the folder of the annotations. image_size, aspect: how frames are resized (common.video.resize).
    sample_posterior: draw latents from the VAE's posterior, as VPP does, with `seed`; otherwise take its mode.
    chunk_size: frames in a batch of the VAE. group_size: episodes whose frames share these batches.
    dtype: of the latent files. limit: encode only so many episodes of each split, the first ones.
    workers: processes that decode videos ahead. max_unreadable_fraction: the run stops where more are unreadable.

    Returns the number of videos by outcome. Raises UserError.
    """
    splits = sorted((root / annotation).glob("*/"))
    files = [file for split in splits for file in sorted(split.glob("*.json"))[:limit]]
    if not files:
        raise MissingFileError(
            f"{root / annotation}: no annotations of a video set here (data/README.md shows the layout); "
            "name the folder of a set with videos="
        )
    mine, side = files[rank::world], image_size // vae.downsample_factor
    groups = _EpisodeGroups(
        root,
        out,
        mine,
        group_size=group_size,
        latent_shape=(vae.channels, side, side),
        image_size=image_size,
        aspect=aspect,
    )
    counts: Counter = Counter()
    with tqdm(total=len(mine), desc=f"encode {root.name}", unit="video", disable=rank != 0) as bar:
        for episodes in DataLoader(groups, batch_size=None, num_workers=workers):
            with explain_full_disk(out):
                _encode_group(
                    episodes, vae, sample_posterior=sample_posterior, chunk_size=chunk_size, dtype=dtype, seed=seed
                )
                for episode in episodes:
                    _count(episode, counts)
                    lengths = [camera.length for camera in episode.cameras if camera.length]
                    if lengths:
                        write_latent_paths(out, out / episode.file.relative_to(root), episode.record, min(lengths))
            bar.update(len(episodes))
            unreadable, tried = counts["unreadable video"] + counts["unreadable annotation"], sum(counts.values())
            if tried >= MIN_TRIED:
                check_unreadable_fraction(unreadable, tried, max_unreadable_fraction, what="videos", out=out)
    return counts


def _encode_group(
    episodes: list[_Episode],
    vae: svd_vae.FrozenVAE,
    *,
    sample_posterior: bool,
    chunk_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Encode all decoded cameras in shared batches, and write the latent files that are not complete yet."""
    decoded = [
        (episode, number, camera)
        for episode in episodes
        for number, camera in enumerate(episode.cameras)
        if camera.images is not None
    ]
    if not decoded:
        return
    images = torch.cat([camera.images for _, _, camera in decoded])  # (N, 3, size, size) in [0, 1], N frames of all
    mean, std = vae.moments(normalize(images), chunk_size=chunk_size)  # each (N, c, h, w)
    lengths = [len(camera.images) for _, _, camera in decoded]
    posteriors = zip(mean.cpu().split(lengths), std.cpu().split(lengths))
    for (episode, number, camera), (camera_mean, camera_std) in zip(decoded, posteriors):
        camera.images = None
        if camera.length:
            continue
        latents = camera_mean  # (T, c, h, w)
        if sample_posterior:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{episode.file.stem}/{number}".encode()) + seed)
            latents = svd_vae.sample_gaussian(camera_mean, camera_std, generator)
        if not torch.isfinite(latents).all():
            camera.problem = (
                f"{episode.file}: camera {number}: the VAE returned NaN or infinity; use precision=fp32 or bf16"
            )
            continue
        _write_latents(latents.to(dtype), camera.target)
        camera.length, camera.encoded = len(latents), True


def _write_latents(latents: Tensor, target: Path) -> None:
    buffer = io.BytesIO()  # writing to a file itself, torch hides the error of a full disk
    torch.save(latents.clone(), buffer)
    with atomic_path(target) as part:
        part.write_bytes(buffer.getvalue())


def _count(episode: _Episode, counts: Counter) -> None:
    if episode.problem:
        counts["unreadable annotation"] += 1
        tqdm.write(f"skipped: {episode.problem}")
    for camera in episode.cameras:
        if camera.length:
            counts["encoded" if camera.encoded else "already there"] += 1
        else:
            counts["unreadable video"] += 1
            tqdm.write(f"skipped: {camera.problem}")


def _finished_length(path: Path, latent_shape: tuple[int, int, int]) -> int:
    """Number of frames of a complete latent file of this shape, 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return 0
    return len(latents) if isinstance(latents, Tensor) and tuple(latents.shape[1:]) == latent_shape else 0


@program("step1_encode")
def main(cfg: DictConfig) -> None:
    """Encode, and log the number of videos by outcome."""
    if cfg.precision not in (*PRECISIONS, "auto"):
        raise UserError(f"precision={cfg.precision}; use one of {', '.join(PRECISIONS)} or auto")
    if cfg.store not in ("fp32", "bf16"):
        raise UserError(f"store={cfg.store}; use fp32 (as VPP does) or bf16 (half the disk)")
    state = processes()
    precision = cfg.precision if cfg.precision != "auto" else "bf16" if bf16_pays(state.device) else "fp32"
    vae = svd_vae.load(cfg.svd).to(state.device, PRECISIONS[precision])
    root = Path(cfg.videos)
    out = Path(cfg.out or root)
    counts = encode_set(
        root,
        out,
        vae,
        image_size=cfg.image_size,
        annotation=cfg.annotation,
        aspect=cfg.aspect,
        sample_posterior=cfg.sample_posterior,
        chunk_size=cfg.chunk_size,
        group_size=cfg.group_size,
        dtype=PRECISIONS[cfg.store],
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
    main()
