"""Train a tiny forward model for a few steps, in as many processes as the launcher starts.

train_distributed.py <set> <hub> <out> <global batch> [<accelerate config with FSDP>]
"""

import os
import sys
import zlib
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.launch import prepare_multi_gpu_env

from common.loop import Loop
from step1_gfdm.dataset import LatentClips
from step1_gfdm.model import GFDM
from step1_gfdm.objective import EDM


class PerSampleNoise(GFDM):
    """The noise depends on the sample's id, so that it is the same in every process."""

    def forward(self, batch):
        text = self.encode_text(batch["text"])
        losses = [
            self.objective.training_loss(
                self._net(latents[:, 0], text[[row]]),
                latents,
                generator=torch.Generator().manual_seed(zlib.crc32(batch["id"][row].encode())),
            )
            for row, latents in enumerate(batch["latents"].split(1))
        ]
        return {"loss": torch.stack(losses).mean()}


def shard_on_the_cpu(config):
    """Set what `accelerate launch` sets for an FSDP config, which it refuses to do without GPUs."""
    arguments = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "-"]))[0]
    os.environ.update({key: value for key, value in prepare_multi_gpu_env(arguments).items() if "FSDP" in key})
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    data, hub, out, size = (*sys.argv[1:4], int(sys.argv[4]))
    processes = PartialState(cpu=True).num_processes
    if sys.argv[5:]:
        shard_on_the_cpu(sys.argv[5])
    set_seed(0)
    model = PerSampleNoise(f"{hub}/svd", f"{hub}/clip", objective=EDM(), image_size=64, num_frames=4, text_dropout=0.0)
    samples = LatentClips(data, num_frames=4, clip={"stride": 2}, latent_shape=(12, 8, 8))
    loop = Loop(
        output_dir=f"{out}/run",
        seed=3,
        max_steps=5,
        batch_size=size // processes,
        grad_accum_steps=2,
        optimizer={"lr": 1e-3, "weight_decay": 1e-2},
        log_every=1,
        save_every=3,
    )
    model = loop.fit(model, samples)
    if loop.accelerator.is_main_process:
        torch.save(dict(model.unet.named_parameters()), Path(out) / "unet.pt")
