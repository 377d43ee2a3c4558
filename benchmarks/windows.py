"""Windows per second in random order: from a pack, from one npz, and from ten npz as VPP and the release read them.

    python -m benchmarks.windows data.root=data/playtable/A [data.folder=training] [windows=100] [rounds=7] [scale=tiny]

One process, no model. The pack is built first, in a temporary folder. All three give the same sample, which is checked.
After the first round the files are in the page cache, so this is the cost of opening, decompressing and resizing, not
of the disk. All other arguments are overrides of the step 3 config.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from benchmarks.imagine import compose_config, machine, parse_command_line, ratio
from common.calvin_format import read_frame
from common.progress import tqdm
from common.video import resize
from step3_defi.data.dataset import CalvinWindows

log = logging.getLogger(__name__)


def ten_files(windows: CalvinWindows, index: int) -> dict[str, Any]:
    """A window read as VPP does: every frame is opened and decoded, and the pictures of the first are used."""
    frame = int(windows.windows[index, 1])
    frames = [
        read_frame(windows.folder, frame + step, [*windows.keys, "rel_actions"]) for step in range(windows.horizon)
    ]
    views = {
        view: resize(frames[0][key][None], windows.image_size)[0] * 2 - 1
        for view, key in zip(windows.views, windows.keys)
    }
    actions = torch.from_numpy(np.stack([arrays["rel_actions"] for arrays in frames]).astype(np.float32))
    return {"id": windows.id(index), "views": views, "text": windows.text(index), "actions": actions}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two samples are equal bit for bit."""
    return (
        a["id"] == b["id"]
        and torch.equal(a["actions"], b["actions"])
        and all(torch.equal(a["views"][view], b["views"][view]) for view in a["views"])
    )


def main() -> None:
    options, overrides = parse_command_line({"scale": "tiny", "windows": 100, "rounds": 7})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        # a window of ten npz has ten actions, so none may lie past the end of an annotation
        cfg = compose_config([*overrides, "data.max_pad=0"], "step3_defi")
        packed = instantiate(cfg.data, split="all", pack=True, cache_dir=folder)
        single = copy.copy(packed)
        single.pack = None
        arms: dict[str, Callable[[int], dict]] = {
            "ten npz": lambda index: ten_files(packed, index),
            "one npz": lambda index: single.sample(index, rng),
            "packed": lambda index: packed.sample(index, rng),
        }
        for index in rng.integers(len(packed), size=20).tolist():
            samples = [read(index) for read in arms.values()]
            if not (same(samples[0], samples[1]) and same(samples[1], samples[2])):
                raise SystemExit(f"error: the readers differ in {samples[0]['id']}")
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for round in tqdm(range(options.rounds + 1), desc="rounds"):
            order = rng.integers(len(packed), size=options.windows).tolist()
            for name, read in arms.items():
                start = time.perf_counter()
                for index in order:
                    read(index)
                if round:  # the first fills the page cache
                    taken[name].append(time.perf_counter() - start)
    log.info("%d windows of %s at %d pixels, %s", len(packed), packed.folder, packed.image_size, machine())
    log.info("| reader | windows/s | times as many as ten npz (quartiles) |\n|---|---|---|")
    for name, times in taken.items():
        log.info("| %s | %.0f | %s |", name, options.windows / statistics.median(times), ratio(taken["ten npz"], times))
    log.info("packed over one npz: %s", ratio(taken["one npz"], taken["packed"]))


if __name__ == "__main__":
    main()
