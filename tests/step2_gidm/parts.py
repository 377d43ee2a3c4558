"""Fakes of the frozen encoders, models of toy size, and pairs of frames in which only a square moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from step2_gidm.model import GIDM
from step2_gidm.quantizer import VectorQuantizer

DIM = 32


class FakeVision(nn.Module):
    """4 x 4 tokens: the mean colour of each patch through a fixed linear map."""

    dim, num_tokens, grid = 16, 16, (4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "map", torch.randn(3, self.dim, generator=torch.Generator().manual_seed(0)), persistent=False
        )

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2) @ self.map


class FakeText(nn.Module):
    """One random but fixed vector for each word; sentences are padded to the longest one with zeros."""

    dim = 8

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.stack([self._vector(word) for word in [*text.split(), "</s>"]]) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None]

    def _vector(self, word: str) -> Tensor:
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(sum(map(ord, word))))


class FakeEncoder(nn.Module):
    """Stands for either encoder where only the widths matter (meta device)."""

    dim, num_tokens, grid = 768, 256, (16, 16)


def make(kind: type = GIDM, quantizer: nn.Module | None = None, **options: object) -> nn.Module:
    """A model of any kind at a toy size."""
    options = {"dim": DIM, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "queries": 2, **options}
    model = kind(
        vision=FakeVision(), text=FakeText(), quantizer=quantizer or VectorQuantizer(8, 6, restart_every=10), **options
    )
    model.decoder.out.reset_parameters()  # the decoder of a new model predicts no change at all
    return model


def moving(batch: int, seed: int = 0) -> dict[str, object]:
    """A bright square on a 4 x 4 board that steps left, right, up or down between the frames."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.zeros(batch, 2, 3, 16, 16)
    for i in range(batch):
        y, x = (torch.randint(1, 3, (2,), generator=generator)).tolist()
        dy, dx = [(0, 1), (0, -1), (1, 0), (-1, 0)][int(torch.randint(4, (), generator=generator))]
        for frame, (row, column) in enumerate([(y, x), (y + dy, x + dx)]):
            frames[i, frame, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 3.0
    return {
        "id": [str(i) for i in range(batch)],
        "frames": frames,
        "text": ["move the square", "push"] * (batch // 2) + ["go"] * (batch % 2),
    }
