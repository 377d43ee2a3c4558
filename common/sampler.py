"""Which samples a rank trains on, and in which order (Table 10).

Batch number b of rank r is a pure function of (seed, b, r), so a resumed run starts at another batch number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from common.errors import UserError
from common.mixture import SampleSet, SeededDataset, collate

WITHIN_BLOCK = 4  # fourth number of a seed, so that these generators differ from those of samples, which have three
VALIDATION_EPOCH = 2**31  # no training reaches this epoch, so held-out draws have generators of their own


class DistributedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one rank, from batch number `start` to `stop`.

    A BlockSet is read block by block. Every reader, that is every loader worker of every rank, takes the next block of
    an endless sequence in turn; its batches come from one block after another, shuffled within the block. The batches
    of a rank alternate between its `num_readers` workers, as DataLoader distributes them, so that a worker reads only
    its own blocks, each of them once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world: int,
        start: int,
        stop: int,
        block: int | None = None,
        num_readers: int = 1,
    ) -> None:
        if block and not batch_size <= block <= length:
            raise UserError(
                f"{length} samples in blocks of {block} give no batches of {batch_size}, which come from one block "
                "each; raise data.stream.block"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.start, self.stop = rank, world, start, stop
        self.block, self.num_readers = block, num_readers

    @staticmethod
    def per_epoch(length: int, batch_size: int, world: int) -> int:
        """Full batches per rank and epoch. A set smaller than one global batch is repeated to fill one."""
        return max(1, length // (batch_size * world))

    @property
    def num_streams(self) -> int:
        """How many blocks are read at the same time, over all ranks."""
        return self.world * self.num_readers

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._blockwise() if self.block else self._shuffled()

    def _shuffled(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.per_epoch(self.length, self.batch_size, self.world)
        share, order, current = self.batch_size * self.world, np.empty(0, int), -1
        for number in range(self.start, self.stop):
            epoch, position = divmod(number, per_epoch)
            if epoch != current:
                order, current = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
                order = np.resize(order, max(self.length, share))
            mine = order[position * share : (position + 1) * share][self.rank :: self.world]
            yield [(epoch, int(index)) for index in mine]

    def _blockwise(self) -> Iterator[list[tuple[int, int]]]:
        per_block = self.block // self.batch_size  # samples of a block past its last whole batch are not drawn
        for number in range(self.start, self.stop):
            turn, position = divmod(number // self.num_readers, per_block)
            reader = self.rank * self.num_readers + number % self.num_readers
            epoch, block = divmod(turn * self.num_streams + reader, self.length // self.block)
            rng = np.random.default_rng((self.seed, epoch, block, WITHIN_BLOCK))
            order = block * self.block + rng.permutation(self.block)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch]


def validation_batches(
    length: int, batch_size: int, *, seed: int, rank: int, world: int, most: int
) -> list[tuple[list[tuple[int, int]], float]]:
    """At most `most` batches of keys for one rank, each with a weight.

    The mean over ranks of the weighted sums of batch means is the mean over samples. Neighbouring samples of a held-out
    set are alike (windows of one annotation), so the batches are drawn from all of it, the same ones at every
    validation. Every rank gets the same number of batches, because a forward pass waits for all processes; a rank that
    has no samples left repeats one with weight 0.
    """
    order = np.random.default_rng((seed, VALIDATION_EPOCH)).permutation(length)[: most * batch_size * world]
    mine = order[rank::world]
    parts = [mine[start : start + batch_size] for start in range(0, math.ceil(len(order) / world), batch_size)]
    return [
        (
            [(VALIDATION_EPOCH, int(index)) for index in (part if len(part) else order[:1])],
            len(part) * world / len(order),
        )
        for part in parts
    ]


def loader(samples: SampleSet, batches: DistributedBatchSampler, *, workers: int, pin: bool) -> DataLoader:
    """The training batches of a rank, prefetched by `workers` processes."""
    # a generator of its own: DataLoader would otherwise draw its base seed from the generator of the model's noise
    return DataLoader(
        SeededDataset(samples, batches.seed, stride=batches.num_streams),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(batches.seed),
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
