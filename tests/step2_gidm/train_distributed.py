"""Train a toy inverse model on an RLDS folder for a few steps, by random access and in a stream.

    train_distributed.py <RLDS folder> <out>

It runs in as many processes as the launcher starts. The global batch is always eight pairs. A micro-batch of the stream
is four of them, and the stream reads two blocks side by side, with two workers of one process or with two processes.
The held-out pairs are the training pairs, all of them.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from common.loop import Loop
from step2_gidm.data.dataset import build_mixture
from tests.step2_gidm.parts import make

if __name__ == "__main__":
    folder, out = sys.argv[1], Path(sys.argv[2])
    processes = PartialState(cpu=True).num_processes
    shared = {
        "seed": 3,
        "max_steps": 5,
        "optimizer": {"lr": 1e-3, "weight_decay": 1e-2},
        "log_every": 1,
        "save_every": None,
        "eval_every": 5,
    }
    alone = {1: {"batch_size": 4, "grad_accum_steps": 2, "num_workers": 2}, 2: {"batch_size": 4}}[processes]
    sets = {
        "toy": {
            "rlds": folder,
            "fps": 1,
            "image": "observation/image",
            "text": "instruction",
            "encoding": "code_points",
        }
    }
    for kind, batch, stream in (
        ("drawn", {"batch_size": 8 // processes}, None),
        ("streamed", alone, {"block": 12, "pairs": 3}),
    ):
        set_seed(0)
        model = make()
        if not PartialState().process_index:
            torch.save(dict(model.named_parameters()), out / "start.pt")
        loop = Loop(output_dir=str(out / kind), **shared, **batch)
        model = loop.fit(
            model,
            build_mixture(sets, stream=stream, length=36, image_size=16),
            build_mixture(sets, length=36, image_size=16),
        )
        if loop.accelerator.is_main_process:
            torch.save(dict(model.named_parameters()), out / f"{kind}.pt")
