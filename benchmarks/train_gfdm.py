"""Training speed of step 1 compared with a plain loop as in the releases, and how fast clips are read.

    python -m benchmarks.train_gfdm [scale=tiny|small|full] [rounds=3] [steps=20] [batch_size=8] [workers=2] ...
    python -m benchmarks.train_gfdm paths.robot=data/playtable/A data.human_fraction=0      on one recording

Ours: common.loop.Loop as configured at that scale. Plain: the same UNet, text encoder, objective and clips in a
hand-written loop with gradient checkpointing always on, fp16 autocast (fp32 on a CPU, where fp16 is slower) and no
workers. Each round runs both, each in a process of its own, so that a ratio compares runs of the same minutes and the
memory is that of one run. All other arguments are overrides of the step 1 config.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from benchmarks.imagine import compose_config, parse_command_line, peak, run_in_subprocess
from common import loop
from common.contracts import TrainableModel
from common.mixture import SampleSet
from common.progress import tqdm
from step1_gfdm.dataset import VideoClips

WARM_UP, PREFETCHED = 3, 32  # training steps and loader batches that are not timed
log = logging.getLogger(__name__)


def batches(samples: SampleSet, batch_size: int, workers: int, count: int) -> DataLoader:
    """`count` batches of one process."""
    return loop.loader(
        samples,
        loop.DistributedBatchSampler(len(samples), batch_size, seed=0, rank=0, world=1, start=0, stop=count),
        workers=workers,
        pin=torch.cuda.is_available(),
    )


def record_step_times(model: TrainableModel) -> list[float]:
    """A list to which the training loop adds the time after every optimizer step of this model."""
    times, on_step_end = [], model.on_step_end

    def timed(step: int, accelerator: Any = None) -> dict[str, float]:
        metrics = on_step_end(step, accelerator)
        times.append(_now())
        return metrics

    model.on_step_end = timed
    return times


def timed_loop(config: DictConfig, folder: str, steps: int, batch_size: int, workers: int = 0) -> loop.Loop:
    """The configured training loop for WARM_UP and `steps` more steps, without validations and saves."""
    return instantiate(
        config,
        output_dir=folder,
        seed=0,
        max_steps=WARM_UP + steps,
        batch_size=batch_size,
        num_workers=workers,
        save_every=None,
        eval_every=None,
        wandb={"mode": "disabled"},
    )


def samples_per_second(times: list[float], steps: int, batch_size: int) -> float:
    """Of the steps after WARM_UP; `times` are those of record_step_times."""
    return steps * batch_size / (times[-1] - times[WARM_UP - 1])


def ours(overrides: list[str], steps: int, batch_size: int, workers: int) -> tuple[float, float]:
    """(samples a second, peak memory in GiB) of the project's loop."""
    cfg = compose_config(overrides)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = timed_loop(cfg.loop, folder, steps, batch_size, workers)
        model = instantiate(cfg.gfdm)
        times = record_step_times(model)
        trainer.fit(model, instantiate(cfg.data, split="train"))
    return samples_per_second(times, steps, batch_size), peak()


def plain(overrides: list[str], steps: int, batch_size: int, workers: int) -> tuple[float, float]:
    """(samples a second, peak memory in GiB) of a loop as the releases write it; `workers` is not used."""
    cfg = compose_config(overrides)
    set_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = instantiate(cfg.gfdm, gradient_checkpointing=True).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **cfg.loop.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    times = []
    for batch in batches(instantiate(cfg.data, split="train"), batch_size, 0, WARM_UP + steps):
        batch = send_to_device(batch, device)
        with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
            loss = model(batch)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        times.append(_now())
    return samples_per_second(times, steps, batch_size), peak()


def clips(overrides: list[str], steps: int, batch_size: int, workers: int, *, videos: bool) -> float:
    """Clips a second of the loader alone, from the latents or from the videos of the same set."""
    cfg = compose_config(overrides)
    samples = instantiate(cfg.data, split="train")
    if videos:
        first = samples.sets[0]
        clip = OmegaConf.to_container(next(iter(cfg.data.sets.values())).clip)
        samples = VideoClips(
            first.root.with_name(first.root.name.replace("latents", "videos")),
            "train",
            num_frames=first.num_frames,
            clip=clip,
            image_size=cfg.gfdm.image_size,
        )
    coming = iter(batches(samples, batch_size, workers, PREFETCHED + 10 * steps))
    for _ in islice(coming, PREFETCHED):
        pass
    start = _now()
    read = sum(len(batch["id"]) for batch in coming)
    return read / (_now() - start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    options, overrides = parse_command_line({"scale": "tiny", "rounds": 3, "steps": 20, "batch_size": 8, "workers": 2})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shared = (overrides, options.steps, options.batch_size, options.workers)
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, function in (("plain", plain), ("ours", ours)):
            found[name].append(run_in_subprocess(function, *shared))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    log.info("%s, batch %d, %s", options.scale, options.batch_size, device)
    for name, runs in found.items():
        log.info(
            "%-6s %8.2f samples/s, peak %.2f GiB",
            name,
            statistics.median(rate for rate, _ in runs),
            max(peak for _, peak in runs),
        )
    ratios = sorted(a / b for (a, _), (b, _) in zip(found["ours"], found["plain"]))
    log.info(
        "ours / plain: %.2f times (%.2f to %.2f over %d rounds)",
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        len(ratios),
    )
    for name, videos in (("latents", False), ("mp4", True)):
        for workers in dict.fromkeys((0, options.workers)):
            rate = run_in_subprocess(clips, overrides, options.steps, options.batch_size, workers, videos=videos)
            log.info("loader, from %-7s with %d workers: %8.1f clips/s", name, workers, rate)


if __name__ == "__main__":
    main()
