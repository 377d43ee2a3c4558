"""Table 12 at full size: pairs read in a stream through a bounded buffer of encoded bytes (A.2).

An RLDS episode is one record of up to 30 MB, so a pair by random access costs a whole one. Here a block of pairs is
made of runs, each an
episode that gives several pairs; a process holds the block it draws from, reads the next one along with it, and no two
processes read the
same block. What a block holds is a function of (seed, number of the block), whoever reads it and whenever.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from common.mixture import Mixture, Skipped, UnreadableSample, skip

PLAN, ORDER, RUN = 1, 2, 3  # the last of four numbers of a generator's key: what it is for (common.sampler has 4)
MAX_TRIES = 20
log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """A pair of the set number `set`, and what it replaces."""

    set: int
    pair: Any
    skipped: list[Skipped]


class StreamingMixture:
    """A mixture of transitions as a block set (common.mixture).

    `block`: pairs of a block, shuffled among themselves; `pairs`: of them from one episode; `buffer_gb`: what the
    encoded images that the
    workers of one rank hold may weigh, in GB. Pairs past that are left on disk and read when drawn, which is slower and
    changes nothing
    else. Sets follow one another by weight; the episodes of a set come all once before any comes again.
    """

    def __init__(self, mixture: Mixture, *, block: int = 2048, pairs: int = 8, buffer_gb: float = 4.0) -> None:
        if not (1 <= pairs <= block and buffer_gb > 0):
            raise ValueError(
                f"a stream needs 1 <= pairs <= block and a buffer, got pairs={pairs}, block={block}, "
                f"buffer_gb={buffer_gb}"
            )
        self.mixture, self.pairs, self.runs, self.buffer = mixture, pairs, block // pairs, int(buffer_gb * 1e9)
        self.block = self.runs * pairs
        self.blocks = max(1, len(mixture) // self.block)
        log.info(
            "streaming %d sets: an epoch is %d blocks of %d pairs, %d from an episode; at most %.2f GB are held",
            len(mixture.sets),
            self.blocks,
            self.block,
            pairs,
            buffer_gb,
        )

    def __len__(self) -> int:
        return self.blocks * self.block

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A pair by random access, from the mixture itself; the stream is what `reader` gives."""
        return self.mixture.sample(index, rng)

    def reader(self, seed: int, stride: int) -> StreamReader:
        """See BlockSet."""
        return StreamReader(self, seed, stride)


class ReadSchedule:
    """Which episode each run reads: run r of epoch e is draw number `draws[r]`, ever, of the set number `sets[r]`."""

    def __init__(self, stream: StreamingMixture, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.size = stream.blocks * stream.runs
        self.before = [np.zeros(len(stream.mixture.sets), np.int64)]  # draws of each set before an epoch
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def episode(self, block: int, run: int) -> tuple[int, int]:
        """(set, episode in it)."""
        epoch, place = divmod(block * self.stream.runs + run, self.size)
        if epoch not in self.epochs:
            if len(self.epochs) > 1:
                del self.epochs[next(iter(self.epochs))]
            self.epochs[epoch] = self._drawn(epoch)
        which, draw = (int(array[place]) for array in self.epochs[epoch])
        count = len(self.stream.mixture.sets[which])
        turn, position = divmod(draw, count)
        return which, int(_order(self.seed, which, turn, count)[position])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self.before) < epoch + 2:
            rng = np.random.default_rng((self.seed, len(self.before) - 1, 0, PLAN))
            self.before.append(self.before[-1] + rng.multinomial(self.size, self.stream.mixture.shares))
        first, counts = self.before[epoch], self.before[epoch + 1] - self.before[epoch]
        rng = np.random.default_rng((self.seed, epoch, 1, PLAN))
        sets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        draws = np.concatenate([np.arange(start, start + count) for start, count in zip(first, counts)])
        order = rng.permutation(self.size)
        return sets[order], draws[order]


class Block:
    """The pairs of one block as far as they are read, run by run in the order of their place on disk."""

    def __init__(self, number: int, episodes: list[tuple[int, int]], size: int) -> None:
        self.number, self.slots, self.left = number, [None] * size, 0
        self.todo = sorted(range(len(episodes)), key=episodes.__getitem__, reverse=True)
        self.read = 0


class StreamReader:
    """The blocks of one process, `stride` apart: what is left of one and what is read of the next are held, never more
    than the budget."""

    def __init__(self, stream: StreamingMixture, seed: int, stride: int) -> None:
        self.stream, self.seed, self.stride = stream, seed, stride
        self.plan = ReadSchedule(stream, seed)
        self.held = self.peak = 0  # bytes of encoded images
        self.warned = False
        self.now: Block | None = None
        self.next: Block | None = None

    def sample(self, epoch: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """See BlockReader. Raises UnreadableSample where a frame does not decode."""
        block, place = divmod(epoch * len(self.stream) + index, self.stream.block)
        if self.now is None or self.now.number != block:
            self._turn_to(block)
        self.now.read += 1
        self._fill(self.next, min(self.stream.runs, math.ceil(self.stream.runs * self.now.read / self.stream.block)))
        slot, self.now.slots[place] = self.now.slots[place], None
        if slot is None:
            run, number = divmod(place, self.stream.pairs)
            slot = self._run(block, run)[number]
        else:
            self.held -= slot.pair.size
        try:
            sample = self.stream.mixture.sets[slot.set].show(slot.pair, rng)
        except UnreadableSample as error:
            raise UnreadableSample(error.id, "; ".join([error.reason, *(each.line for each in slot.skipped)])) from error
        return {**sample, "skipped": slot.skipped}

    def _turn_to(self, number: int) -> None:
        if self.next is not None and self.next.number == number:
            self.now = self.next
        else:
            self.held, self.now = 0, self._block(number)
        self.next = self._block(number + self.stride)
        self.held = sum(slot.pair.size for slot in self.now.slots if slot)
        self._fill(self.now, self.stream.runs)
        if self.now.left and not self.warned:
            self.warned = True
            log.warning(
                "block %d: %d of %d pairs do not fit into the buffer and are read again when drawn; raise "
                "data.stream.buffer_gb or "
                "lower data.stream.block (said once)",
                number,
                self.now.left,
                self.stream.block,
            )

    def _block(self, number: int) -> Block:
        return Block(number, [self.plan.episode(number, run) for run in range(self.stream.runs)], self.stream.block)

    def _fill(self, block: Block, runs: int) -> None:
        """Read until `runs` runs of a block are done."""
        worker = get_worker_info()
        budget = self.stream.buffer // (worker.num_workers if worker else 1)
        while self.stream.runs - len(block.todo) < runs:
            run = block.todo.pop()
            for place, slot in enumerate(self._run(block.number, run), run * self.stream.pairs):
                if self.held + slot.pair.size > budget:
                    block.left += 1
                    continue
                block.slots[place] = slot
                self.held += slot.pair.size
            self.peak = max(self.peak, self.held)

    def _run(self, block: int, run: int) -> list[Slot]:
        """The pairs of one episode, or of others in its place where it is unreadable."""
        which, episode = self.plan.episode(block, run)
        members, skipped = self.stream.mixture.sets[which], []
        rng = np.random.default_rng((self.seed, block, run, RUN))
        while True:
            try:
                return [Slot(which, pair, skipped) for pair in members.pairs(episode, rng, self.stream.pairs)]
            except UnreadableSample as error:
                skip(skipped, error, MAX_TRIES, "episodes")
                episode = int(rng.integers(len(members)))


@functools.lru_cache(maxsize=64)
def _order(seed: int, which: int, turn: int, count: int) -> np.ndarray:
    """The order in which a set's episodes come in one pass over it."""
    return np.random.default_rng((seed, which, turn, ORDER)).permutation(count).astype(np.int32)
