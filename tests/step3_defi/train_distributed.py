"""Train a tiny policy for a few steps with the training program, in as many processes as the launcher starts.

train_distributed.py <tree> <name> <global batch> [key=value ...]
"""

import sys
import zlib

import torch
from accelerate import PartialState

from step3_defi import train
from step3_defi.edm import ActionEDM
from tests.step3_defi.parts import configure


class PerSampleNoise(ActionEDM):
    """Noise that depends on the sample only, so that it is the same in every process."""

    def squared_errors(self, network, actions, *, generator=None):
        seeds = [zlib.crc32(row.numpy().tobytes()) for row in actions]
        with torch.random.fork_rng():
            drawn = []
            for number, seed in enumerate(seeds):
                torch.manual_seed(seed + number % 4)  # policy.edm.noise_draws
                drawn.append((self.sample_noise_levels(1), torch.randn_like(actions[:1])))
        sigma, noise = (torch.cat(parts) for parts in zip(*drawn))
        c_skip, c_out, c_in = self.scalings(sigma)
        noisy = actions + sigma.view(-1, 1, 1) * noise
        return (network(c_in * noisy, sigma).float() - (actions - c_skip * noisy) / c_out).square()


if __name__ == "__main__":
    tree, name, size = *sys.argv[1:3], int(sys.argv[3])
    processes = PartialState(cpu=True).num_processes
    train.main.__wrapped__(
        configure(
            "step3_defi",
            f"paths.ckpts={tree}/ckpts",
            f"paths.data={tree}/data",
            f"name={name}",
            f"data.root={tree}/data/demonstrations",
            "data.val_fraction=0.25",
            "data.frame_stride=4",
            "loop.max_steps=5",
            f"loop.batch_size={size // processes}",
            "loop.eval_every=5",
            "loop.log_every=1",
            "loop.warmup_steps=1",
            "loop.precision=no",
            "loop.ema_decay=null",
            "policy.edm._target_=tests.step3_defi.train_distributed.PerSampleNoise",
            "wandb.mode=disabled",
            "policy.alignment.steps=0",
            *sys.argv[4:],
        )
    )
