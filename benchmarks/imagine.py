"""What the forward model saves by a truncated UNet and by one pass for all views.

    python -m benchmarks.imagine [scale=tiny|small|full] [repeats=20] [views=2] [device=cpu]

Ours: one pass over all views, which ends after the last tapped block. Plain: the whole diffusers UNet, once per view.
Both get the same weights, latents and text, and are timed in turns, so that a ratio compares the same minutes.
Operations are counted on the meta device, at this scale and at the paper's; times and memory are of this machine.
`scale=full` needs a GPU.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.program import CONFIGS
from step1_gfdm import unet as svd_unet

TEXT_TOKENS, TAPS = 20, (0, 1)
log = logging.getLogger(__name__)


def compose_config(overrides: list[str], name: str = "step1_gfdm") -> DictConfig:
    """The config of a step, step 1 unless `name` says otherwise."""
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose(name, overrides)


def parse_command_line(mine: dict[str, Any]) -> tuple[DictConfig, list[str]]:
    """(options of a benchmark, among them `scale`; the remaining arguments, overrides of a step's config)."""
    known = [word for word in sys.argv[1:] if word.split("=")[0] in mine]
    options = OmegaConf.merge(mine, OmegaConf.from_dotlist(known))
    return options, [f"scale={options.scale}", *(word for word in sys.argv[1:] if word not in known)]


def geometry(scale: str) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """The UNet's config and the shape (F, c, h, w) of one view's input at a scale."""
    cfg = OmegaConf.to_container(compose_config([f"scale={scale}"]).gfdm, resolve=True)
    if scale == "full":
        config = svd_unet.SVD_UNET
    else:
        config = {
            **svd_unet.UNetSpatioTemporalConditionModel.load_config(cfg["svd"], subfolder="unet"),
            **(cfg["unet"] or {}),
        }
    side = cfg["image_size"] // 8
    return config, (cfg["num_frames"], config["in_channels"], side, side)


def inputs(
    config: Mapping[str, Any], shape: tuple[int, ...], views: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random inputs of `views` views."""
    return {
        "sample": torch.randn(views, *shape, device=device, dtype=dtype),
        "timestep": torch.full((views,), 1.6, device=device),
        "text": torch.randn(views, TEXT_TOKENS, config["cross_attention_dim"], device=device, dtype=dtype),
        "time_ids": torch.tensor([[7.0, 127.0, 0.0]], device=device, dtype=dtype).expand(views, -1),
    }


def ours(unet: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Compute all views in one truncated pass."""
    svd_unet.features(
        unet, given["sample"], given["timestep"], text=given["text"], time_ids=given["time_ids"], up_block_indices=TAPS
    )


def plain(unet: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Compute the whole UNet, one view at a time."""
    for view in range(len(given["sample"])):
        one = {name: value[view : view + 1] for name, value in given.items()}
        unet(
            one["sample"],
            one["timestep"],
            encoder_hidden_states=one["text"],
            added_time_ids=one["time_ids"],
            return_dict=False,
        )


def operations(config: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, float]:
    """TFLOP of one view; a multiplication and an addition count as two. Nothing is computed."""
    unet = svd_unet.build(config, device="meta").to("meta").eval()  # a few parameters of diffusers stay on the CPU
    given = inputs(config, shape, 1, torch.device("meta"), torch.float32)
    found = {}
    for name, function in (("plain", plain), ("ours", ours)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(unet, given)
        found[name] = counter.get_total_flops() / 1e12
    return found


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call; the device is synchronised before and after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak() -> float:
    """Peak memory of this process so far in GiB, of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ratio(plain: Sequence[float], ours: Sequence[float]) -> str:
    """Median and quartiles of the ratios plain / ours of paired measurements."""
    ratios = sorted(a / b for a, b in zip(plain, ours))
    return f"{statistics.median(ratios):.2f} ({ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f})"


def machine() -> str:
    """The GPU, or the number of CPU threads, that was measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def run_in_subprocess(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a call in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


def main() -> None:
    options = OmegaConf.merge(
        {"scale": "tiny", "repeats": 20, "views": 2, "device": "cuda" if torch.cuda.is_available() else "cpu"},
        OmegaConf.from_cli(),
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device)
    for scale in dict.fromkeys((options.scale, "full")):
        counted = operations(*geometry(scale))
        log.info(
            "operations of a view, %-5s  plain %.4g TFLOP, ours %.4g TFLOP: %.0f %%",
            scale,
            counted["plain"],
            counted["ours"],
            100 * counted["ours"] / counted["plain"],
        )
    config, shape = geometry(options.scale)
    if options.scale == "full" and device.type == "cpu":
        raise SystemExit("error: timing scale=full needs a GPU; scale=tiny and scale=small run here")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet = svd_unet.build(config, device=device).to(dtype).eval()
    given = inputs(config, shape, options.views, device, dtype)
    rounds = {"plain": plain, "ours": ours}
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    memory = dict.fromkeys(rounds, 0.0)
    with torch.no_grad():
        for function in rounds.values():  # warm up
            function(unet, given)
        for _ in range(options.repeats):
            for name, function in rounds.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                taken[name].append(seconds(lambda function=function: function(unet, given), device))
                if device.type == "cuda":
                    memory[name] = peak()
    for name, times in taken.items():
        held = f", peak {memory[name]:.2f} GiB" if device.type == "cuda" else ""
        log.info("%-6s %8.2f ms for %d views%s", name, 1000 * statistics.median(times), options.views, held)
    log.info(
        "plain / ours: %s times (quartiles) on %s, %s", ratio(taken["plain"], taken["ours"]), machine(), options.scale
    )


if __name__ == "__main__":
    main()
