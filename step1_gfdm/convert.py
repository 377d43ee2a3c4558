"""Convert a published data set into a video set (A.2, Table 11).

It writes a video and a JSON annotation for every episode (common.video_set describes the format). The annotation is
written last and marks the episode as complete. Complete episodes are skipped, so a run that was stopped goes on where
it was. The processes of `accelerate launch` share the episodes, and each of them converts with `workers` processes.

Examples:
    python -m step1_gfdm.convert source=bridge root=<folder as downloaded> out=data/opensource_robotdata/bridge
    scripts/step1_convert.sh source=calvin root=data/playtable/A out=data/opensource_robotdata/playtable image_size=64
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common import video
from common.calvin_format import CalvinFormatError
from common.errors import FilteredSample, UnreadableSample, UserError
from common.files import write_text
from common.program import program
from common.progress import tqdm
from common.rlds import RldsError
from common.video_set import finished_length, write_annotation
from common.workers import pool
from step1_gfdm.bad_input import MIN_TRIED, check_unreadable_fraction, explain_full_disk
from step1_gfdm.sources import FILTER_REASONS, Camera, EpisodeEntry, Source

UNREADABLE = (UnreadableSample, video.VideoError, RldsError, CalvinFormatError)
CONVERTED, ALREADY_THERE = "converted", "already there"
log = logging.getLogger(__name__)
_worker_source: dict[str, Source] = {}  # in a worker process: its source under the key "source"


class Outcome(NamedTuple):
    """What became of an episode: CONVERTED, ALREADY_THERE, "unreadable" or one of FILTER_REASONS."""

    ending: str
    frames: int = 0
    message: str = ""


def convert(
    source: Source,
    out: Path,
    *,
    image_size: int = 256,
    aspect: str = "squeeze",
    gop: int = 8,
    crf: int = 18,
    limit: int | None = None,
    workers: int = 1,
    max_unreadable_fraction: float = 0.1,
    rank: int = 0,
    world: int = 1,
) -> Counter:
    """Write the episodes of a source as a video set, those of process `rank` of `world`.

    image_size, aspect, gop, crf: side of the videos in pixels and how they are resized and coded (common.video).
    limit: convert only so many usable episodes of each split, the first ones.
    max_unreadable_fraction: the run stops where more are unreadable. Episodes that a rule of the source excludes
    (FILTER_REASONS) do not count.

    Returns the number of episodes by outcome, and the number of "frames". Raises UserError.
    """
    options = {"image_size": image_size, "aspect": aspect, "gop": gop, "crf": crf}
    entries = _mark_duplicates(source.episodes())
    counts = Counter(entry.reason for entry in entries if entry.reason) if rank == 0 else Counter()
    unusable = [entry for entry in entries if entry.reason and entry.reason not in FILTER_REASONS]
    for entry in unusable if rank == 0 else ():
        tqdm.write(f"skipped: {entry.id}: {entry.reason}")
    check_unreadable_fraction(len(unusable), len(entries), max_unreadable_fraction, what="episodes", out=out)
    _check_options(out, options)

    mine = _usable(entries, limit)[rank::world]
    unreadable = 0
    with tqdm(total=len(mine), desc=f"convert {out.name}", unit="episode", disable=rank != 0) as bar:
        for tried, outcome in enumerate(_outcomes(source, out, mine, options, workers), start=1):
            counts[outcome.ending] += 1
            counts["frames"] += outcome.frames
            bar.update()
            if outcome.ending not in (CONVERTED, ALREADY_THERE, *FILTER_REASONS):
                unreadable += 1
                tqdm.write(f"skipped: {outcome.message}")
                if tried >= MIN_TRIED:
                    check_unreadable_fraction(unreadable, tried, max_unreadable_fraction, what="episodes", out=out)
    check_unreadable_fraction(unreadable, len(mine), max_unreadable_fraction, what="episodes", out=out)
    return counts


def _mark_duplicates(entries: list[EpisodeEntry]) -> list[EpisodeEntry]:
    """The entries; a later episode whose files would have the name of an earlier one's is marked as unusable."""
    taken: set[tuple[str, str]] = set()
    marked = []
    for entry in entries:
        key = (entry.split, _file_name(entry.id))
        if not entry.reason and key in taken:
            entry = EpisodeEntry(entry.id, entry.split, "id taken by another episode")
        taken.add(key)
        marked.append(entry)
    return marked


def _usable(entries: list[EpisodeEntry], limit: int | None) -> list[EpisodeEntry]:
    """The usable entries, with a limit the first ones of each split."""
    usable = [entry for entry in entries if not entry.reason]
    if limit is None:
        return usable
    splits = sorted({entry.split for entry in usable})
    return [entry for split in splits for entry in [each for each in usable if each.split == split][:limit]]


def _outcomes(
    source: Source, out: Path, entries: list[EpisodeEntry], options: dict[str, Any], workers: int
) -> Iterator[Outcome]:
    """Convert the entries, in their order."""
    if workers <= 1:
        for entry in entries:
            yield _convert_episode(source, out, entry, options)
        return
    with pool(workers, _init_worker, source) as executor:
        remaining, futures = iter(entries), []
        try:
            futures = [executor.submit(_run_in_worker, out, entry, options) for entry in islice(remaining, 2 * workers)]
            while futures:
                yield futures.pop(0).result()
                futures += [executor.submit(_run_in_worker, out, entry, options) for entry in islice(remaining, 1)]
        finally:
            for future in futures:
                future.cancel()


def _init_worker(source: Source) -> None:
    torch.set_num_threads(1)  # the other cores belong to the other workers
    _worker_source["source"] = source


def _run_in_worker(out: Path, entry: EpisodeEntry, options: dict[str, Any]) -> Outcome:
    return _convert_episode(_worker_source["source"], out, entry, options)


def _convert_episode(source: Source, out: Path, entry: EpisodeEntry, options: dict[str, Any]) -> Outcome:
    name = _file_name(entry.id)
    if length := finished_length(out, entry.split, name):
        return Outcome(ALREADY_THERE, length)
    try:
        with explain_full_disk(out):
            episode = source.read(entry)
            folder = out / "videos" / entry.split / name
            lengths = [
                _write_camera(camera, folder / f"{number}.mp4", **options)
                for number, camera in enumerate(episode.cameras)
            ]
            if len(set(lengths)) != 1:
                raise UnreadableSample(entry.id, f"its cameras have different numbers of frames, {lengths}")
            write_annotation(
                out,
                entry.split,
                name,
                texts=episode.texts,
                num_cameras=len(lengths),
                length=lengths[0],
                fps=episode.cameras[0].fps,
                scene=episode.scene,
                states=episode.state,
                episode_id=entry.id,
            )
    except UNREADABLE as error:
        return Outcome(error.reason if isinstance(error, FilteredSample) else "unreadable", message=str(error))
    return Outcome(CONVERTED, lengths[0])


def _write_camera(camera: Camera, path: Path, *, image_size: int, aspect: str, gop: int, crf: int) -> int:
    """Write one camera as mp4 and return its number of frames. Only the resized frames are in memory as a whole."""
    resized = [
        rearrange((video.resize(frames, image_size, aspect) * 255).round().byte(), "t c h w -> t h w c").numpy()
        for frames in camera.batches
    ]
    if not resized:
        raise UnreadableSample(str(path), "its source has no frames")
    video.write_mp4(path, np.concatenate(resized), camera.fps or 1.0, gop=gop, crf=crf)
    return camera.length


def _file_name(id: str) -> str:
    return re.sub(r"[^\w.-]+", "_", id).lstrip(".") or "_"


def _check_options(out: Path, options: dict[str, Any]) -> None:
    """Record the options of a set in convert.json. Raises UserError where it was begun with other options."""
    file = out / "convert.json"
    if not file.is_file():
        write_text(file, json.dumps(options) + "\n")
        return
    known = json.loads(file.read_text())
    if known != options:
        raise UserError(f"{out} was converted with {known}, this run has {options}; choose another folder with out=")


@program("step1_convert")
def main(cfg: DictConfig) -> None:
    """Convert, and log the number of episodes by outcome."""
    state = PartialState(cpu=True)
    out = Path(cfg.out)
    source = instantiate(OmegaConf.to_container(cfg.source, resolve=True), root=cfg.root)
    counts = convert(
        source,
        out,
        image_size=cfg.image_size,
        aspect=cfg.aspect,
        gop=cfg.gop,
        crf=cfg.crf,
        limit=cfg.limit,
        workers=cfg.workers,
        max_unreadable_fraction=cfg.max_unreadable_fraction,
        rank=state.process_index,
        world=state.num_processes,
    )
    log.info("process %d: %s", state.process_index, ", ".join(f"{n} {ending}" for ending, n in sorted(counts.items())))
    log.info("video set in %s; encode it with scripts/step1_prepare_data_latent.sh videos=%s", out, out)


if __name__ == "__main__":
    main()
