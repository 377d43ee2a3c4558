"""Speed of step 2 compared with the same model as the releases write it: explicit softmax(Q K^T) V, no cached text.

    python -m benchmarks.train_gidm [scale=tiny|small|full] [gidm=official] [rounds=3] [steps=20] [batch_size=32]
    [repeats=20] ...

Ours and plain are one model from one config, trained with common.loop.Loop; plain replaces the attention and encodes
every sentence at every step. Pairs are random pictures in memory with SENTENCES instructions, so that no disk is
measured. Each round trains both, each in a process of its own, so that a ratio compares runs of the same minutes and
the memory is that of one run. Then `embed` and `infer` of both are timed in turns at batch 1 and 32. All other
arguments are overrides of the step 2 config; the frozen encoders must exist (paths.hub).
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import types
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from hydra.utils import instantiate
from torch import Tensor

from benchmarks.imagine import compose_config, parse_command_line, peak, run_in_subprocess, seconds
from benchmarks.train_gfdm import record_step_times, samples_per_second, timed_loop
from common.attention import Attention
from common.frozen import T5TextEncoder
from common.progress import tqdm
from step2_gidm.model import InverseModel

SENTENCES = 64
BATCHES = (1, 32)  # batch sizes of inference: one robot, and many simulators
log = logging.getLogger(__name__)


class RandomPairs:
    """Random pairs in memory, as a sample set."""

    def __init__(self, image_size: int, count: int = 256) -> None:
        self.frames = torch.rand(count, 2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        self.texts = [
            f"push the {i % 8} block to the {'left' if i % 2 else 'right'} then open drawer {i}"
            for i in range(SENTENCES)
        ]

    def __len__(self) -> int:
        return len(self.frames)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"id": str(index), "frames": self.frames[index], "text": self.texts[index % SENTENCES]}


def use_naive_attention(model: InverseModel) -> InverseModel:
    """The same weights, with attention and text encoding as the releases write them."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = types.MethodType(_written_out, module)
    model.text.forward = types.MethodType(_every_time, model.text)
    return model


def _written_out(
    self: Attention, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    context = x if context is None else context
    q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
    if causal:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).tril().logical_not(), float("-inf"))
    if key_mask is not None:
        bias = bias.expand(len(q), -1, -1).masked_fill(key_mask.logical_not()[:, None], float("-inf"))[:, None]
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias, dim=-1)
    return self.to_out((weights @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def _every_time(self: T5TextEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
    return self.module(
        **{name: tokens[name] for name in ("input_ids", "attention_mask")}
    ).last_hidden_state.float(), tokens["attention_mask"].bool()


def train(overrides: list[str], steps: int, batch_size: int, plain: bool) -> tuple[float, float]:
    """(samples a second, peak memory in GiB) of the training loop."""
    cfg = compose_config(overrides, "step2_gidm")
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        loop = timed_loop(cfg.loop, folder, steps, batch_size)
        model = instantiate(cfg.gidm)
        times = record_step_times(use_naive_attention(model) if plain else model)
        loop.fit(model, RandomPairs(model.vision.image_size))
    return samples_per_second(times, steps, batch_size), peak()


@torch.no_grad()
def infer(overrides: list[str], repeats: int) -> tuple[dict[int, dict[str, list[float]]], float]:
    """Seconds of `embed` and `infer`, batch size -> "ours" or "plain" -> repeats, timed in turns.

    Also the largest difference of their latents in fp32.
    """
    cfg = compose_config(overrides, "step2_gidm")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {}
    for name in ("plain", "ours"):
        set_seed(0)
        models[name] = instantiate(cfg.gidm).to(device).eval()
    use_naive_attention(models["plain"])
    samples = RandomPairs(models["ours"].vision.image_size, max(BATCHES))
    frames, texts = samples.frames.to(device), [samples.texts[i % SENTENCES] for i in range(max(BATCHES))]

    def once(model: InverseModel, batch: int) -> Tensor:
        now, future = model.embed(frames[:batch].flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return model.infer(now, future, texts[:batch]).continuous

    latents = [once(model, max(BATCHES)) for model in models.values()]
    found: dict[int, dict[str, list[float]]] = {batch: {name: [] for name in models} for batch in BATCHES}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for batch, taken in found.items():
            for model in models.values():
                once(model, batch)
            for _ in tqdm(range(repeats), desc=f"inference, batch {batch}"):
                for name, model in models.items():
                    taken[name].append(seconds(lambda model=model, batch=batch: once(model, batch), device))
    return found, (latents[0] - latents[1]).abs().max().item()


def main() -> None:
    options, overrides = parse_command_line(
        {"scale": "tiny", "rounds": 3, "steps": 20, "batch_size": 32, "repeats": 20}
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in tqdm(range(options.rounds), desc="rounds"):
        for name, runs in found.items():
            runs.append(run_in_subprocess(train, overrides, options.steps, options.batch_size, name == "plain"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    log.info("%s, batch %d, %s", options.scale, options.batch_size, device)
    for name, runs in found.items():
        log.info(
            "%-6s %8.2f samples/s in training, peak %.2f GiB",
            name,
            statistics.median(rate for rate, _ in runs),
            max(peak for _, peak in runs),
        )
    for what, ratios in (
        ("rate", [a / b for (a, _), (b, _) in zip(found["ours"], found["plain"])]),
        ("peak memory", [a / b for (_, a), (_, b) in zip(found["ours"], found["plain"])]),
    ):
        log.info(
            "ours / plain, %s: %.2f times (%.2f to %.2f over %d rounds)",
            what,
            statistics.median(ratios),
            min(ratios),
            max(ratios),
            len(ratios),
        )
    times, apart = run_in_subprocess(infer, overrides, options.repeats)
    for batch, taken in times.items():
        ratios = [a / b for a, b in zip(taken["plain"], taken["ours"])]
        log.info(
            "embed + infer, batch %2d: plain %.1f ms, ours %.1f ms, plain / ours %.2f times",
            batch,
            *(1000 * statistics.median(taken[name]) for name in ("plain", "ours")),
            statistics.median(ratios),
        )
    log.info("latents of the two differ by %.1g at most in fp32", apart)


if __name__ == "__main__":
    main()
