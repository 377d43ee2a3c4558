"""Program: videos -> VAE latents, once, before training (Sec. 3.1).   python -m step1_gfdm.encode data=<video set> [out=<set>]

Several processes (accelerate launch) share the files. What is there and whole is skipped, so a stopped run goes on.
"""
from __future__ import annotations

import json
import logging
import os
import pickle
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from common import video
from common.mixture import Unreadable
from common.program import program
from step1_gfdm import vae
from step1_gfdm.dataset import known_length, latent_target, read_annotation, video_path

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger(__name__)


def encode_set(data: Path, out: Path, latent_space: vae.LatentSpace, *, image_size: int, annotation: str = "annotation", aspect: str = "squeeze",
               sample: bool = True, chunk: int = 64, seed: int = 0, limit: int | None = None, rank: int = 0, world: int = 1) -> Counter:
    """Encode every camera of every video of a set, or of the first `limit` of each split; returns how many videos ended how.

    Bad ones are counted and named.
    """
    files = [file for split in sorted((data / annotation).glob("*/")) for file in sorted(split.glob("*.json"))[:limit]]
    if not files:
        raise FileNotFoundError(f"{data / annotation}: no annotations of a video set here (data/README.md shows the layout)")
    counts: Counter = Counter()
    for file in tqdm(files[rank::world], desc=f"encode {data.name}", unit="video", disable=rank != 0):
        try:
            record = read_annotation(file)
            cameras = len(record["videos"]) if isinstance(record.get("videos"), list) else 0
            if not cameras:
                raise Unreadable(str(file), "names no videos")
        except Unreadable as error:
            counts["unreadable annotation"] += 1
            tqdm.write(f"skipped: {error}")
            continue
        lengths = {}
        for view in range(cameras):
            try:
                target = latent_target(out, out / file.relative_to(data), record, view)
                lengths[view], ending = _encode_view(video_path(data, file, record, view), target, latent_space, record,
                                                     image_size=image_size, aspect=aspect, sample=sample, chunk=chunk,
                                                     seed=zlib.crc32(f"{file.stem}/{view}".encode()) + seed)
                counts[ending] += 1
            except (Unreadable, video.VideoError) as error:
                counts["unreadable video"] += 1
                tqdm.write(f"skipped: {error}")
        _write_annotation(out, out / file.relative_to(data), record, lengths)
    return counts


def _encode_view(source: Path, target: Path, latent_space: vae.LatentSpace, record: dict[str, Any], *, image_size: int, aspect: str, sample: bool,
                 chunk: int, seed: int) -> tuple[int, str]:
    """One video to one .pt; returns its number of frames and how it ended."""
    side = image_size // latent_space.factor
    there = _whole(target, (latent_space.channels, side, side))
    if there:
        return there, "already there"
    frames = video.read_frames(source)
    stated = known_length(record)
    if stated is not None and stated != len(frames):
        raise Unreadable(str(source), f"has {len(frames)} frames, its annotation says {stated}; is the file truncated?")
    generator = torch.Generator(latent_space.device).manual_seed(seed)
    parts = []
    for start in range(0, len(frames), chunk):
        images = video.resize(frames[start:start + chunk], image_size, aspect) * 2 - 1
        parts.append(latent_space.encode(images, sample=sample, generator=generator, chunk=chunk).cpu())
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise Unreadable(str(source), "the VAE gave NaN or infinity; use precision=fp32 or bf16")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        torch.save(latents, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return len(latents), "encoded"


def _whole(path: Path, shape: tuple[int, int, int]) -> int:
    """Number of frames of a finished latent file of this shape, 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return 0
    return len(latents) if isinstance(latents, Tensor) and tuple(latents.shape[1:]) == shape else 0


def _write_annotation(out: Path, file: Path, record: dict[str, Any], lengths: dict[int, int]) -> None:
    """Name latents and length in the set's annotation where it does not name them yet."""
    if not lengths:
        return
    new = dict(record)
    if known_length(new) is None:
        new["video_length"] = min(lengths.values())
    new["latent_videos"] = [{"latent_video_path": str(latent_target(out, file, record, view).relative_to(out))}
                            for view in range(len(record["videos"]))]
    if file.is_file() and new == record:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(new, indent=2) + "\n")
    os.replace(beside, file)


@program("step1_encode")
def main(cfg: DictConfig) -> None:
    if cfg.precision not in PRECISIONS:
        raise ValueError(f"precision={cfg.precision}; use one of {', '.join(PRECISIONS)}")
    state = PartialState()
    latent_space = vae.load(cfg.svd).to(state.device, PRECISIONS[cfg.precision])
    data = Path(cfg.videos)
    out = Path(cfg.out or data)
    counts = encode_set(data, out, latent_space, image_size=cfg.image_size, annotation=cfg.annotation, aspect=cfg.aspect, sample=cfg.sample,
                        chunk=cfg.chunk, limit=cfg.limit, seed=cfg.seed, rank=state.process_index, world=state.num_processes)
    log.info("process %d: %s", state.process_index, ", ".join(f"{n} {ending}" for ending, n in sorted(counts.items())))
    log.info("latents in %s", out)


if __name__ == "__main__":
    # `data` is also a config group, whose values Hydra would look up as files
    sys.argv[1:] = [re.sub(r"^data=", "videos=", argument) for argument in sys.argv[1:]]
    main()
