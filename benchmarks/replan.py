"""Time of one plan, by the parts of Table 13, compared with a plain path.

    python -m benchmarks.replan [scale=tiny|small|full] [repeats=10] [warm_up=2] [batch=1] [compile=false] [device=cpu]

Ours: DeFIPolicy.predict_action_chunk, as a rollout calls it. Plain: the same policy in eager mode, with one view at a
time through the whole UNet, and every sentence encoded at every call. Both share their random weights and are timed in
turns. `scale=full` has the published sizes of SVD, CLIP, T5-base and DINOv2 and needs 12 GB; the other scales use the
stand-ins. All other arguments are overrides of the step 3 config.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from diffusers import AutoencoderKLTemporalDecoder
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.imagine import compose_config, machine, parse_command_line, peak, ratio, seconds
from common import standins
from common.frozen import text_encoders
from common.progress import tqdm
from step1_gfdm import unet as svd_unet
from step3_defi import DeFI
from step3_defi.policy import DeFIPolicy, compile_options

PAPER = {"forward model": 86.1, "inverse model": 42.9, "action adapter": 24.3}  # Table 13: ms on an RTX 4090
SENTENCES = ("push the red block to the left", "open the drawer", "lift the blue block", "turn on the light bulb")
log = logging.getLogger(__name__)


def parts(model: DeFI) -> dict[str, list[tuple[Any, str]]]:
    """Part of Table 13 -> the calls that it consists of, each an object and the name of its method."""
    return {
        "forward model": [(model.gfdm.module, "imagine")],
        "inverse model": [
            (model.gidm, "embed"),
            (model.projector, "project_pairs"),
            (model.gidm, "infer"),
            (model.gidm, "embed_action"),
        ],
        "action adapter": [
            (model.video_former, "forward"),
            (model.goal, "pooled"),
            (model.adapter, "encode"),
            (model.edm, "sample"),
        ],
    }


def hub(folder: Path, scale: str) -> list[str]:
    """Write third-party models with random weights under `folder`.

    Returns the overrides with which step 3 builds on them, and not on artifacts.
    """
    standins.make_all(folder / "tiny")
    words = [f"paths.hub={folder}", "defi/gfdm=vanilla_svd", "defi/gidm=scratch"]
    if scale != "full":
        return words
    _full_size(folder)
    return [
        *words,
        "policy.gfdm.unet={num_frames: 25}",
    ]  # a change, if only in name: the UNet is built from its config, without a file of 6 GB


def _full_size(folder: Path) -> None:
    svd_unet.build(device="meta").save_config(folder / "svd/unet")
    AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "svd/vae")
    words = {name: AutoTokenizer.from_pretrained(folder / "tiny" / name) for name in ("clip", "t5")}
    ids = {f"{name}_token_id": getattr(words["clip"], f"{name}_token_id") for name in ("bos", "eos", "pad")}
    clip = CLIPTextConfig(
        hidden_size=512, intermediate_size=2048, projection_dim=512, num_hidden_layers=12, num_attention_heads=8, **ids
    )
    CLIPTextModelWithProjection(clip).save_pretrained(folder / "clip")
    T5EncoderModel(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)).save_pretrained(
        folder / "t5"
    )
    for name, tokenizer in words.items():
        tokenizer.save_pretrained(folder / name)
    arguments = {"img_size": 224, "num_classes": 0}
    save_for_hf(
        timm.create_model("vit_base_patch14_reg4_dinov2", **arguments),
        str(folder / "dinov2"),
        model_args=arguments,
        safe_serialization=True,
    )


def random_policy(overrides: list[str]) -> DeFI:
    """A policy of random weights. Zero-initialised weights of the adapter are randomised, or its output is constant."""
    torch.manual_seed(0)
    model = instantiate(OmegaConf.to_container(compose_config(overrides, "step3_defi").policy, resolve=True))
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


@contextmanager
def baseline_path(model: DeFI) -> Iterator[None]:
    """Within this context the policy computes as the releases do."""
    gfdm, views = model.gfdm.module, len(model.views)
    imagine, embed = gfdm.imagine, model.gidm.embed

    def one_by_one(image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        count = len(text) // views
        return torch.cat([imagine(part, text[:count], seed=seed) for part in image.chunk(views)])

    changes = [
        (gfdm, "imagine", one_by_one),
        (gfdm, "_feature_unet", _whole(gfdm.unet, gfdm.up_block_indices)),
        (model.adapter, "_compiled_call_impl", None),
        (model.gidm, "embed", lambda image: torch.cat([embed(part) for part in image.chunk(views)])),
        *((encoder, "_recall", torch.no_grad()(encoder._encode)) for encoder in text_encoders(model)),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


def _whole(unet: nn.Module, up_block_indices: tuple[int, ...]) -> Callable[..., list[Tensor]]:
    """A function that computes every block of the UNet and returns the outputs of the tapped ones."""

    def run(sample: Tensor, timestep: Tensor, text: Tensor, time_ids: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        handles = [
            unet.up_blocks[tap].register_forward_hook(lambda _m, _i, output, tap=tap: found.update({tap: output}))
            for tap in up_block_indices
        ]
        unet(sample, timestep, encoder_hidden_states=text, added_time_ids=time_ids)
        for handle in handles:
            handle.remove()
        return [found[tap] for tap in up_block_indices]

    return run


def timed(policy: DeFIPolicy, observations: list[dict], texts: list[str]) -> dict[str, float]:
    """Seconds of one plan and of its parts; the device is synchronised before and after each."""
    device, spent = policy.model.device, {}

    def wrap(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            found: list[Any] = []
            spent[part] = spent.get(part, 0.0) + seconds(lambda: found.append(call(*arguments, **named)), device)
            return found[0]

        return run

    with ExitStack() as stack:
        for part, calls in parts(policy.model).items():
            for owner, name in calls:
                stack.enter_context(patch.object(owner, name, wrap(part, getattr(owner, name))))
        whole = seconds(lambda: policy.predict_action_chunk(observations, texts), device)
    return {**spent, "the rest": whole - sum(spent.values()), "a replan": whole}


def get_obs(count: int) -> list[dict]:
    """Random observations in CALVIN's format."""
    rng = np.random.default_rng(0)
    return [
        {
            "rgb_obs": {
                "rgb_static": rng.integers(0, 256, (200, 200, 3), np.uint8),
                "rgb_gripper": rng.integers(0, 256, (84, 84, 3), np.uint8),
            },
            "robot_obs": rng.normal(size=15),
        }
        for _ in range(count)
    ]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options, overrides = parse_command_line(
        {"scale": "tiny", "repeats": 10, "warm_up": 2, "batch": 1, "compile": False, "device": device}
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        policy = DeFIPolicy(random_policy([*overrides, *hub(Path(folder), options.scale)]).to(options.device))
    if options.compile:
        policy.model.compile_parts(**compile_options(policy.model.device))
    seen, texts = get_obs(options.batch), [SENTENCES[i % len(SENTENCES)] for i in range(options.batch)]
    found: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    memory = dict.fromkeys(found, 0.0)
    with baseline_path(policy.model):
        expected = policy.predict_action_chunk(seen, texts) if options.warm_up else None
    for round in tqdm(range(options.warm_up + options.repeats), desc="rounds"):
        for name, runs in found.items():
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            with baseline_path(policy.model) if name == "plain" else ExitStack():
                runs.append(timed(policy, seen, texts))
            memory[name] = peak()
        if round < options.warm_up:
            for runs in found.values():
                runs.clear()
    log.info("%s, batch %d, %s%s", options.scale, options.batch, machine(), ", compiled" if options.compile else "")
    log.info("| part | Table 13, ms | ours, ms | plain, ms | plain / ours (quartiles) |\n|---|---|---|---|---|")
    for part in found["ours"][0]:
        times = {name: [run[part] for run in runs] for name, runs in found.items()}
        log.info(
            "| %s | %s | %.1f | %.1f | %s |",
            part,
            PAPER.get(part, sum(PAPER.values()) if part == "a replan" else ""),
            *(1000 * statistics.median(times[name]) for name in ("ours", "plain")),
            ratio(times["plain"], times["ours"]),
        )
    if options.device != "cpu":
        log.info("peak memory: ours %.2f GiB, plain %.2f GiB", memory["ours"], memory["plain"])
    if expected is not None:
        difference = np.abs(policy.predict_action_chunk(seen, texts) - expected).max()
        log.info("actions of the two differ by %.1g at most", difference)


if __name__ == "__main__":
    main()
