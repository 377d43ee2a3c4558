"""A dataset in CALVIN's format, fake forward and inverse models, and batches for the coupled policy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from common.contracts import LatentAction
from common.program import CONFIGS
from step3_defi.adapter import ActionAdapter
from step3_defi.config import AlignmentConfig, BottleneckConfig, ObservationConfig, PairingConfig, StreamsConfig
from step3_defi.edm import ActionEDM
from step3_defi.model import DeFI
from step3_defi.projector import Projector
from step3_defi.video_former import VideoFormer

SENTENCES = ["push the red block", "open the drawer"]
PARENT_CONFIGS = {"gfdm": "step1_gfdm", "gidm": "step2_gidm"}


def configure(name: str, *overrides: str) -> DictConfig:
    """The config of a program at scale tiny."""
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose(name, ["scale=tiny", *overrides])


def write_calvin(root: Path, *, recordings: int = 4, length: int = 40, first: int = 100) -> Path:
    """Write recordings of `length` frames, each with one annotation of its frames 3 to 35.

    All numbers of the action of frame f are f / 1000, but the gripper's is 1 or -1.
    """
    folder = root / "training"
    (folder / "lang_annotations").mkdir(parents=True)
    rng, spans, notes = np.random.default_rng(0), [], []
    for number in range(recordings):
        start = first + number * (length + 5)
        spans.append((start, start + length - 1))
        notes.append((start + 3, start + 35))
        for frame in range(start, start + length):
            action = np.full(7, 1e-3 * frame, np.float64)
            action[6] = -1.0 if frame % 2 else 1.0
            np.savez(
                folder / f"episode_{frame:07d}.npz",
                rel_actions=action,
                robot_obs=np.zeros(15),
                rgb_static=rng.integers(0, 255, (20, 20, 3), np.uint8),
                rgb_gripper=rng.integers(0, 255, (8, 8, 3), np.uint8),
            )
    np.save(folder / "ep_start_end_ids.npy", np.array(spans))
    write_annotations(folder, notes)
    return root


def write_annotations(folder: Path, notes: list[tuple[int, int]]) -> None:
    texts = [SENTENCES[i % 2] for i in range(len(notes))]
    content = {
        "language": {"ann": texts, "task": ["task"] * len(texts), "emb": np.zeros((len(texts), 1, 4), np.float32)},
        "info": {"episodes": [], "indx": notes},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", np.array(content, dtype=object), allow_pickle=True)


class FakeGFDM(nn.Module):
    """Features that depend on picture, sentence and seed, through one layer that could be trained."""

    feature_dim, num_frames, num_tokens = 12, 4, 16

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, self.feature_dim)
        self.dropout = nn.Dropout(0.5)  # shows whether the model is in eval mode
        self.calls = 0

    def freeze_unused_blocks(self) -> None:
        """Do nothing: every block is used."""

    def compile_unet(self, **options: Any) -> None:
        """Do nothing: there is no UNet."""

    def imagine(self, image: Tensor, text: list[str], *, seed: int = 0) -> Tensor:
        self.calls += 1
        patches = nn.functional.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2)  # (B, 16, 3)
        spoken = torch.tensor([float(len(t)) for t in text], device=image.device).view(-1, 1, 1)
        frames = torch.arange(self.num_frames, device=image.device).view(1, -1, 1, 1) * 0.1 + seed
        return self.dropout(torch.sin(self.layer(patches) + 0.1 * spoken)[:, None] + frames)


class FakeGIDM(nn.Module):
    """An inverse model with the interface of step 2 and a nearest-code bottleneck."""

    embed_dim, num_tokens, num_action_tokens, num_codes = 8, 16, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2 * self.embed_dim, self.num_action_tokens * 4)
        self.codebook = nn.Parameter(torch.randn(6, 4))
        self.action_up = nn.Linear(4, self.embed_dim)
        self.decoder = nn.Linear(4, 4)
        self.restarted: list[int] = []
        self.beta_only = False

    def embed(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            grid = nn.functional.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2)
            return torch.cat([grid, grid * 2, grid[..., :2]], dim=-1)

    def infer(self, now: Tensor, future: Tensor, text: list[str]) -> LatentAction:
        assert len(text) == len(now) and now.shape == future.shape
        z = self.encoder(torch.cat([now, future], dim=-1).mean(1)).unflatten(1, (self.num_action_tokens, 4))
        codes = torch.cdist(z.detach().flatten(0, 1), self.codebook.detach()).argmin(1).view(z.shape[:2])
        chosen = self.codebook[codes]
        commitment = 0.25 * (z - chosen.detach()).square().mean()
        loss = commitment if self.beta_only else commitment + (chosen - z.detach()).square().mean()
        return LatentAction(z, z + (chosen - z).detach(), loss, codes)

    def embed_action(self, quantized: Tensor) -> Tensor:
        return self.action_up(quantized)

    def drop_decoder(self) -> None:
        del self.decoder

    def freeze_codebook(self) -> None:
        self.beta_only = True
        self.codebook.requires_grad_(False)

    def on_step_end(self, step: int, accelerator: Any = None) -> dict[str, float]:
        self.restarted.append(step)
        return {"restarted": 1.0}


class FakeGoal(nn.Module):
    pooled_dim = 6

    def pooled(self, text: list[str]) -> Tensor:
        return torch.stack([torch.sin(torch.arange(6) * (1.0 + len(t))) for t in text])


def build(**changes: Any) -> DeFI:
    """A small DeFI over fakes. `changes` go to its constructor; a dotted key sets a value of one of its settings."""
    settings = {
        "edm": (ActionEDM, {"num_inference_steps": 4}),
        "observation": (ObservationConfig, {"views": ("static", "gripper"), "image_size": 16}),
        "pairing": (PairingConfig, {"frames": (1, 3)}),
        "streams": (StreamsConfig, {"names": ("video", "latent", "future"), "fuse_grid": 2}),
        "alignment": (AlignmentConfig, {}),
        "bottleneck": (BottleneckConfig, {}),
    }
    parts = {
        "gfdm": FakeGFDM(),
        "gidm": FakeGIDM(),
        "goal": FakeGoal(),
        "projector": partial(Projector),
        "video_former": partial(
            VideoFormer,
            dim=16,
            embed_hidden_dim=None,
            queries=2,
            depth=1,
            spatial_heads=2,
            spatial_head_dim=8,
            temporal_heads=2,
        ),
        "adapter": partial(ActionAdapter, dim=16, layers=2, num_heads=2, action_horizon=10, action_dim=7, dropout=0.0),
    }
    for key, value in changes.items():
        name, _, field = key.partition(".")
        if field:
            settings[name][1][field] = value
        else:
            parts[key] = value
    made = {name: kind(**values) for name, (kind, values) in settings.items() if name not in parts}
    return DeFI(**{**made, **parts})


def wake(model: nn.Module) -> None:
    """Give random weights to layers that are initialized with zeros."""
    for parameter in model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)


def make_batch(count: int = 3, *, futures: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    views = {name: torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1 for name in ("static", "gripper")}
    batch = {
        "id": [f"s{i}" for i in range(count)],
        "views": views,
        "text": [SENTENCES[i % 2] for i in range(count)],
        "actions": torch.rand(count, 10, 7, generator=generator) * 2 - 1,
    }
    if futures:
        batch["futures"] = {name: torch.rand(count, futures, 3, 16, 16, generator=generator) * 2 - 1 for name in views}
    return batch
