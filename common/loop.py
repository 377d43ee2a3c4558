"""The training loop of all three steps, on accelerate (Table 10); no other module steps an optimizer.

A resumed run restores the state of the loop and starts the sampler (common.sampler) at another batch number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils.data import DataLoader

from common import optim
from common.contracts import TrainableModel
from common.distributed import processes
from common.errors import NonFiniteLoss, UserError
from common.files import write_text
from common.mixture import SampleSet, SeededDataset, Skipped, TooManyUnreadable, block_size, collate
from common.precision import bf16_pays
from common.progress import tqdm
from common.sampler import DistributedBatchSampler, loader, validation_batches
from common.tracking import Tracker

log = logging.getLogger(__name__)
# The share of damaged draws is judged over at least this many draws of a process. A stream of some hundred episodes may
# well begin with a damaged one.
MIN_DRAWS = 5000
RUN_FILE = "run.json"  # in a resume state: the run that wrote it


class TrainState:
    """The progress of a run, saved with accelerate's state: optimizer steps, draws of this process, best validation."""

    def __init__(self) -> None:
        self.step, self.skipped, self.left_out, self.drawn = 0, 0, 0, 0
        self.best = math.inf

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Loop:
    """Trains a model whose forward returns {"loss": scalar, **metrics} on a sample set.

    Metrics are averaged over ranks and over the batches between two log lines or of a validation. Metrics of integers
    are counts: they are added up, and `TrainableModel.metrics_from_counts` turns the sums into numbers.

    batch_size: samples per process and forward pass. max_steps: optimizer steps; takes precedence over `epochs`.
    precision: accelerate's "no", "bf16" or "fp16", or "auto" for bf16 where the machine is faster with it. ema_decay:
    keep an exponential moving average of the trained parameters; validation and the returned model use it. best: the
    validation metric to minimise; `on_best` of `fit` runs at each new minimum. max_unreadable_fraction: the share of a
    process's draws that may be damaged; draws that a rule excludes do not count.

    A run that was stopped continues from `output_dir/resume` with the same result as an uninterrupted one.
    """

    def __init__(
        self,
        *,
        output_dir: str,
        seed: int = 0,
        epochs: int | None = None,
        max_steps: int | None = None,
        batch_size: int,
        grad_accum_steps: int = 1,
        optimizer: dict[str, Any],
        schedule: str = "constant_with_warmup",
        warmup_steps: int = 0,
        max_grad_norm: float | None = 1.0,
        precision: str = "no",
        ema_decay: float | None = None,
        num_workers: int = 0,
        log_every: int = 10,
        eval_every: int | None = None,
        eval_batches: int = 16,
        save_every: int | None = None,
        compile: bool = False,
        max_unreadable_fraction: float = 0.05,
        best: str | None = None,
        wandb: dict[str, Any] | None = None,
    ) -> None:
        if epochs is None and max_steps is None:
            raise UserError("loop.epochs and loop.max_steps are both null; give one of them")
        self.output_dir, self.seed, self.epochs, self.max_steps = Path(output_dir), seed, epochs, max_steps
        self.batch_size, self.grad_accum_steps, self.optimizer = batch_size, grad_accum_steps, dict(optimizer)
        self.schedule, self.warmup_steps, self.max_grad_norm = schedule, warmup_steps, max_grad_norm
        self.precision, self.ema_decay, self.num_workers = precision, ema_decay, num_workers
        self.log_every, self.eval_every, self.eval_batches, self.save_every = (
            log_every,
            eval_every,
            eval_batches,
            save_every,
        )
        self.compile, self.max_unreadable_fraction, self.wandb = compile, max_unreadable_fraction, wandb
        self.best, self.step = best, 0
        self._stop_asked, self._left_out = False, ""

    def fit(
        self,
        model: TrainableModel,
        train_set: SampleSet,
        val_set: SampleSet | None = None,
        *,
        on_best: Callable[[int], Any] | None = None,
    ) -> TrainableModel:
        """Train to the end and return the unwrapped model in eval mode, with EMA weights if EMA is on.

        Under FSDP the returned model is complete on the main process only. `on_best(step)` is called on the main
        process at each new minimum of the metric `best`, while the model holds the validated weights. Raises UserError
        for settings that do not fit together and for the resume state of another run.
        """
        precision = self.precision if self.precision != "auto" else "bf16" if bf16_pays(processes().device) else "no"
        self.accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=1)
        sharded = self.accelerator.distributed_type is DistributedType.FSDP
        if sharded and self.ema_decay:
            raise UserError(
                f"loop.ema_decay={self.ema_decay}: FSDP shards the weights, so no average is kept; set "
                "loop.ema_decay=null or train under DDP"
            )
        if sharded and self.best:
            raise UserError(
                f"loop.best={self.best}: FSDP shards the weights, so the best ones are not kept; set loop.best=null or "
                "train under DDP"
            )
        set_seed(self.seed, device_specific=self.accelerator.num_processes > 1)
        world, per_epoch = (
            self.accelerator.num_processes,
            DistributedBatchSampler.per_epoch(len(train_set), self.batch_size, self.accelerator.num_processes),
        )
        total = self.max_steps or max(1, math.ceil(self.epochs * per_epoch / self.grad_accum_steps))
        block = block_size(train_set)
        raw_optimizer, scheduler = optim.build_optimizer(
            model, **self.optimizer, schedule=self.schedule, warmup_steps=self.warmup_steps, total_steps=total
        )
        self.run = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "grad_accum_steps": self.grad_accum_steps,
            "world": world,
            "samples": len(train_set),
            "total": total,
            "block": block,
            "readers": block and max(1, self.num_workers),
            "ema": bool(self.ema_decay),
            "model": _model_signature(model, raw_optimizer),
        }
        model.to(self.accelerator.device)
        wrapped, optimizer = self.accelerator.prepare(torch.compile(model) if self.compile else model, raw_optimizer)
        self.total, self.progress = total, TrainState()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema = (
            EMAModel(self.trained, decay=self.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
            if self.ema_decay
            else None
        )
        self.accelerator.register_for_checkpointing(*filter(None, (self.progress, scheduler, self.ema)))
        self.on_best = on_best
        self._resume()
        tracker = Tracker(self.output_dir, self.progress.step, self.wandb) if self.accelerator.is_main_process else None
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            self._run(model, wrapped, optimizer, scheduler, train_set, val_set, tracker)
        finally:
            signal.signal(signal.SIGTERM, previous)
            if tracker:
                tracker.close()
        if self.ema:
            self.ema.copy_to(self.trained)
        if sharded:
            _gather(model)
        self.step = self.progress.step
        return model.eval()

    def _run(
        self,
        model: TrainableModel,
        wrapped: nn.Module,
        optimizer: Any,
        scheduler: Any,
        train_set: SampleSet,
        val_set: SampleSet | None,
        tracker: Tracker | None,
    ) -> None:
        total, progress = self.total, self.progress
        batches = iter(self._loader(train_set, progress.step * self.grad_accum_steps, total * self.grad_accum_steps))
        bar = tqdm(
            total=total,
            initial=progress.step,
            desc=self.output_dir.name,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
        )
        sums, since, clock = {}, 0, time.perf_counter()
        wrapped.train()
        model.on_train_begin(progress.step)
        while progress.step < total:
            for metrics in self._forward_backward(wrapped, batches):
                _add(sums, metrics, 1 / self.grad_accum_steps)
            norm = self.accelerator.clip_grad_norm_(self.trained, self.max_grad_norm) if self.max_grad_norm else None
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if self.ema:
                self.ema.step(self.trained)
            progress.step, since = progress.step + 1, since + 1
            extra = model.on_step_end(progress.step, self.accelerator)
            bar.update()
            if progress.step % self.log_every == 0 or progress.step == total:
                row = {f"train/{k}": float(v) for k, v in (self._metrics(model, sums, since) | extra).items()}
                row |= {
                    "lr": scheduler.get_last_lr()[0],
                    "steps_per_second": since / (time.perf_counter() - clock),
                    "data/skipped": progress.skipped,
                    "data/left_out": progress.left_out,
                } | ({"grad_norm": float(norm)} if norm is not None else {})
                bar.set_postfix(loss=f"{row['train/loss']:.4f}")
                if self._left_out:
                    log.info(
                        "%d of %d draws left out by rule and replaced, the last: %s",
                        progress.left_out,
                        progress.drawn,
                        self._left_out,
                    )
                    self._left_out = ""
                if tracker:
                    tracker.log(progress.step, row)
                sums, since, clock = {}, 0, time.perf_counter()
            if (
                val_set is not None
                and self.eval_every
                and (progress.step % self.eval_every == 0 or progress.step == total)
            ):
                row = self._validate(model, wrapped, val_set)
                if tracker:
                    tracker.log(progress.step, row)
            stop = self._everyone_stops()
            if stop or progress.step == total or (self.save_every and progress.step % self.save_every == 0):
                self._save()
            if stop and progress.step < total:
                bar.close()
                log.warning(
                    "SIGTERM: saved at step %d in %s; run the same command to continue",
                    progress.step,
                    self.output_dir / "resume",
                )
                raise SystemExit(128 + signal.SIGTERM)
        bar.close()

    def _forward_backward(self, wrapped: nn.Module, batches: Iterator[dict]) -> Iterator[dict[str, torch.Tensor]]:
        """Forward and backward over the micro-batches of one optimizer step."""
        for micro in range(self.grad_accum_steps):
            batch = self._take(batches)
            quiet = (
                self.accelerator.no_sync(wrapped) if micro + 1 < self.grad_accum_steps else self.accelerator.autocast()
            )
            with quiet:
                metrics = wrapped(batch)
            if not torch.isfinite(metrics["loss"]).all():
                raise NonFiniteLoss(
                    f"loss is {metrics['loss'].item()} at step {self.progress.step + 1}; samples: "
                    f"{', '.join(map(str, batch['id']))}"
                )
            self.accelerator.backward(metrics["loss"] / self.grad_accum_steps)
            yield metrics

    def _take(self, batches: Iterator[dict]) -> dict[str, Any]:
        batch = next(batches)
        damaged, left_out = _split_by_rule(batch.pop("skipped"))
        progress = self.progress
        progress.skipped += len(damaged)
        progress.left_out += len(left_out)
        progress.drawn += len(batch["id"]) + len(damaged) + len(left_out)
        self._left_out = left_out[-1] if left_out else self._left_out
        for line in damaged:
            log.warning("unreadable sample replaced: %s", line)
        if progress.skipped > self.max_unreadable_fraction * max(MIN_DRAWS, progress.drawn):
            raise TooManyUnreadable(
                f"{progress.skipped} of {progress.drawn} samples were unreadable, more than "
                f"loop.max_unreadable_fraction={self.max_unreadable_fraction}: "
                f"repair the data or raise it; the last: {damaged[-1] if damaged else '(earlier)'}"
            )
        return send_to_device(batch, self.accelerator.device)

    def _loader(self, samples: SampleSet, start: int, stop: int) -> DataLoader:
        batches = DistributedBatchSampler(
            len(samples),
            self.batch_size,
            seed=self.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            start=start,
            stop=stop,
            block=block_size(samples),
            num_readers=max(1, self.num_workers),
        )
        return loader(samples, batches, workers=self.num_workers, pin=self.accelerator.device.type == "cuda")

    @torch.no_grad()
    def _validate(self, model: TrainableModel, wrapped: nn.Module, val_set: SampleSet) -> dict[str, float]:
        """Metrics over the same held-out batches with the same noise every time, with EMA weights if EMA is on.

        The random generators of the training are not advanced.
        """
        chunks = validation_batches(
            len(val_set),
            self.batch_size,
            seed=self.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            most=self.eval_batches,
        )
        loader = DataLoader(
            SeededDataset(val_set, self.seed),
            batch_sampler=[keys for keys, _ in chunks],
            collate_fn=collate,
            num_workers=self.num_workers,
        )
        if self.ema:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        wrapped.eval()
        sums: dict[str, Any] = {}
        skipped: list[list[Skipped]] = []
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            for (_, weight), batch in zip(chunks, loader):
                skipped += batch.pop("skipped")
                with self.accelerator.autocast():
                    metrics = wrapped(send_to_device(batch, self.accelerator.device))
                _add(sums, metrics, weight)
        damaged, left_out = _split_by_rule(skipped)
        if damaged:
            log.warning("%d unreadable held-out samples replaced, the last: %s", len(damaged), damaged[-1])
        if left_out:
            log.info("%d held-out samples left out by rule and replaced, the last: %s", len(left_out), left_out[-1])
        row = {k: float(v) for k, v in self._metrics(model, sums, 1).items()}
        self._note_best(row)
        wrapped.train()
        if self.ema:
            self.ema.restore(self.trained)
        return {f"val/{k}": v for k, v in row.items()}

    def _note_best(self, row: dict[str, float]) -> None:
        if self.best is None or self.on_best is None:
            return
        if self.best not in row:
            raise UserError(f"loop.best={self.best}: the model reports no such metric; it reports {', '.join(row)}")
        if row[self.best] < self.progress.best:
            self.progress.best = row[self.best]
            if self.accelerator.is_main_process:
                self.on_best(self.progress.step)

    def _metrics(self, model: TrainableModel, sums: dict[str, torch.Tensor], batches: int) -> dict[str, Any]:
        """Means over `batches` and ranks, and the model's metrics from the counts of all ranks."""
        counts = {k: self.accelerator.reduce(v, reduction="sum") for k, v in sums.items() if not v.is_floating_point()}
        means = {k: self.accelerator.reduce(v, reduction="mean") / batches for k, v in sums.items() if k not in counts}
        return means | (model.metrics_from_counts(counts) if counts else {})

    def _on_sigterm(self, *_: Any) -> None:
        self._stop_asked = True

    def _everyone_stops(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._stop_asked
        flag = torch.tensor(float(self._stop_asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _save(self) -> None:
        """Write the resume state under another name, then rename it: a save that is killed leaves the previous one."""
        root = self.output_dir / "resume"
        part, done = root / "part", root / f"step_{self.progress.step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        if self.accelerator.is_main_process:
            write_text(part / RUN_FILE, json.dumps(self.run))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(done, ignore_errors=True)
            os.replace(part, done)
            for old in root.glob("step_*"):
                if old != done:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Load the newest resume state. Raises UserError where another run wrote it, before anything is loaded."""
        states = sorted((self.output_dir / "resume").glob("step_*"))
        if not states:
            return
        file = states[-1] / RUN_FILE
        known = json.loads(file.read_text()) if file.is_file() else {}
        other = {key: (known.get(key), value) for key, value in self.run.items() if known.get(key) != value}
        if other:
            raise UserError(
                f"{states[-1]}: this resume state belongs to another run (then, now): {other}; choose another name= or "
                f"delete {self.output_dir / 'resume'}"
            )
        for state in sorted(states[-1].glob("custom_checkpoint_*.pkl")):  # accelerate unpickles them without a check
            if names := get_unsafe_globals_in_checkpoint(state):
                raise UserError(
                    f"{state}: holds objects of {', '.join(sorted(names))}, which no run of this project writes; "
                    f"delete {self.output_dir / 'resume'}"
                )
        self.accelerator.load_state(str(states[-1]))
        log.info("resumed %s at step %d", self.output_dir, self.progress.step)


def _model_signature(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A short hash over what a resume state must fit: names and shapes of all tensors, and the optimizer's groups."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = [(name, list(tensor.shape), name in trained) for name, tensor in model.state_dict().items()]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return hashlib.sha256(json.dumps([tensors, groups]).encode()).hexdigest()[:12]


def _split_by_rule(skipped: list[list[Skipped]]) -> tuple[list[str], list[str]]:
    """(lines of the damaged draws, lines of the draws that a rule excludes)."""
    found = [each for entries in skipped for each in entries]
    return [each.line for each in found if not each.by_rule], [each.line for each in found if each.by_rule]


def _add(sums: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor], share: float = 1.0) -> None:
    """Add the metrics of a batch: numbers times its share of the mean, counts as they are unless that share is 0."""
    for key, value in metrics.items():
        value = value.detach()
        sums[key] = sums.get(key, 0) + (value.float() * share if value.is_floating_point() else value * (share > 0))


def _gather(model: nn.Module) -> None:
    """Replace FSDP's shards by complete parameters on the CPU of the main process. All ranks must call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:  # torch.nn has no method that replaces a sharded parameter by a complete one
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=module._parameters[leaf].requires_grad)
