"""Table 12 at full size: pairs are read in a stream through a bounded buffer of encoded images (A.2).

An RLDS episode is one record of up to 30 MB, so a pair drawn by random access costs the reading of a whole record.
Here the pairs come in blocks. A block consists of runs, and a run is several pairs of one episode. A process holds the
block that it draws from and meanwhile reads its next one. No two processes read the same block. The content of a block
depends on the seed and on the number of the block alone, not on who reads it or when.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from common.errors import UnreadableSample, UserError
from common.mixture import Mixture, Skipped, skip
from step2_gidm.data.pairs import FramePair

# The last of the four numbers that seed a generator: what it is used for. common.sampler uses 4.
PLAN, ORDER, RUN = 1, 2, 3
MAX_TRIES = 20
log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """A pair of the set with index `set`, and the samples that could not be read and that it replaces."""

    set: int
    pair: FramePair
    skipped: list[Skipped]


class StreamingMixture:
    """A mixture of transitions that is read in blocks (a BlockSet of common.mixture).

    The sets are drawn by weight. All episodes of a set are read once before any of them is read again.

    Args:
        mixture: the sets and their weights.
        block: number of pairs in a block, which are shuffled among themselves.
        pairs: number of pairs in a run, all from one episode.
        buffer_gb: limit, in GB, on the encoded images that all workers of one rank hold together. Pairs beyond it stay
            on disk and are read when they are drawn, which is slower and changes nothing else.

    Raises UserError where these numbers do not fit together.
    """

    def __init__(self, mixture: Mixture, *, block: int = 2048, pairs: int = 8, buffer_gb: float = 4.0) -> None:
        if not (1 <= pairs <= block and buffer_gb > 0):
            raise UserError(
                f"a stream needs 1 <= pairs <= block and a buffer, got pairs={pairs}, block={block}, "
                f"buffer_gb={buffer_gb}"
            )
        self.mixture, self.pairs, self.runs, self.buffer_size = mixture, pairs, block // pairs, int(buffer_gb * 1e9)
        self.block = self.runs * pairs
        self.num_blocks = max(1, len(mixture) // self.block)
        log.info(
            "streaming %d sets: an epoch is %d blocks of %d pairs, %d from an episode; at most %.2f GB are held",
            len(mixture.sets),
            self.num_blocks,
            self.block,
            pairs,
            buffer_gb,
        )

    def __len__(self) -> int:
        return self.num_blocks * self.block

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A pair by random access, from the mixture itself; `reader` gives the stream."""
        return self.mixture.sample(index, rng)

    def reader(self, seed: int, stride: int) -> StreamReader:
        """See BlockSet."""
        return StreamReader(self, seed, stride)


class ReadSchedule:
    """Which episode each run reads.

    For every epoch it holds (sets, draws), two arrays over the runs: run r reads set number sets[r], of which it is
    draw number draws[r] since the start of the training.
    """

    def __init__(self, stream: StreamingMixture, seed: int) -> None:
        self.stream, self.seed = stream, seed
        self.runs_per_epoch = stream.num_blocks * stream.runs
        self.draws_before = [np.zeros(len(stream.mixture.sets), np.int64)]  # draws of each set before every epoch
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the latest two

    def episode(self, block: int, run: int) -> tuple[int, int]:
        """(index of the set, index of the episode in it)."""
        epoch, position = divmod(block * self.stream.runs + run, self.runs_per_epoch)
        if epoch not in self.epochs:
            if len(self.epochs) > 1:
                del self.epochs[next(iter(self.epochs))]
            self.epochs[epoch] = self.draw_epoch(epoch)
        which, draw = (int(array[position]) for array in self.epochs[epoch])
        count = len(self.stream.mixture.sets[which])
        turn, place = divmod(draw, count)
        return which, int(_episode_order(self.seed, which, turn, count)[place])

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(sets, draws) of the runs of an epoch, each (runs_per_epoch,)."""
        while len(self.draws_before) < epoch + 2:
            rng = np.random.default_rng((self.seed, len(self.draws_before) - 1, 0, PLAN))
            drawn = rng.multinomial(self.runs_per_epoch, self.stream.mixture.shares)
            self.draws_before.append(self.draws_before[-1] + drawn)
        first, counts = self.draws_before[epoch], self.draws_before[epoch + 1] - self.draws_before[epoch]
        rng = np.random.default_rng((self.seed, epoch, 1, PLAN))
        sets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        draws = np.concatenate([np.arange(start, start + count) for start, count in zip(first, counts)])
        order = rng.permutation(self.runs_per_epoch)
        return sets[order], draws[order]


class Block:
    """The pairs of one block that have been read, and the runs that have not, in the order of their place on disk."""

    def __init__(self, number: int, episodes: list[tuple[int, int]], size: int) -> None:
        self.number, self.slots = number, [None] * size
        self.pending = sorted(range(len(episodes)), key=episodes.__getitem__, reverse=True)  # runs; the last is next
        self.num_drawn = 0
        self.num_left_on_disk = 0


class StreamReader:
    """The blocks of one process, which are `stride` apart.

    It holds what is left of the current block and what has been read of the next one, within the limit of the buffer.
    """

    def __init__(self, stream: StreamingMixture, seed: int, stride: int) -> None:
        self.stream, self.seed, self.stride = stream, seed, stride
        self.schedule = ReadSchedule(stream, seed)
        self.held_bytes = self.peak_bytes = 0  # of encoded images
        self.warned = False
        self.current: Block | None = None
        self.next: Block | None = None

    def sample(self, epoch: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """See BlockReader. Raises UnreadableSample where a frame does not decode."""
        stream = self.stream
        number, place = divmod(epoch * len(stream) + index, stream.block)
        if self.current is None or self.current.number != number:
            self._advance_to(number)
        self.current.num_drawn += 1
        self._read_runs(self.next, min(stream.runs, math.ceil(stream.runs * self.current.num_drawn / stream.block)))
        slot, self.current.slots[place] = self.current.slots[place], None
        if slot is None:
            run, position = divmod(place, stream.pairs)
            slot = self.read_run(number, run)[position]
        else:
            self.held_bytes -= slot.pair.size
        try:
            sample = stream.mixture.sets[slot.set].load(slot.pair, rng)
        except UnreadableSample as error:
            lines = [error.reason, *(each.line for each in slot.skipped)]
            raise UnreadableSample(error.id, "; ".join(lines)) from error
        return {**sample, "skipped": slot.skipped}

    def read_run(self, block: int, run: int) -> list[Slot]:
        """The pairs of one run. An episode that cannot be read is replaced by a random one of the same set."""
        which, episode = self.schedule.episode(block, run)
        transitions, skipped = self.stream.mixture.sets[which], []
        rng = np.random.default_rng((self.seed, block, run, RUN))
        while True:
            try:
                pairs = transitions.sample_pairs(episode, rng, self.stream.pairs)
                return [Slot(which, pair, skipped) for pair in pairs]
            except UnreadableSample as error:
                skip(skipped, error, MAX_TRIES, "episodes")
                episode = int(rng.integers(len(transitions)))

    def _advance_to(self, number: int) -> None:
        """Make block `number` the current one, read all of it, and start the next."""
        if self.next is not None and self.next.number == number:
            self.current = self.next
        else:
            self.held_bytes, self.current = 0, self._new_block(number)
        self.next = self._new_block(number + self.stride)
        self.held_bytes = sum(slot.pair.size for slot in self.current.slots if slot)
        self._read_runs(self.current, self.stream.runs)
        if self.current.num_left_on_disk and not self.warned:
            self.warned = True
            log.warning(
                "block %d: %d of %d pairs do not fit into the buffer and are read again when drawn; "
                "raise data.stream.buffer_gb or lower data.stream.block (this is said once)",
                number,
                self.current.num_left_on_disk,
                self.stream.block,
            )

    def _new_block(self, number: int) -> Block:
        episodes = [self.schedule.episode(number, run) for run in range(self.stream.runs)]
        return Block(number, episodes, self.stream.block)

    def _read_runs(self, block: Block, runs: int) -> None:
        """Read the pending runs of a block until `runs` of them have been read."""
        worker = get_worker_info()
        limit = self.stream.buffer_size // (worker.num_workers if worker else 1)
        while self.stream.runs - len(block.pending) < runs:
            run = block.pending.pop()
            for place, slot in enumerate(self.read_run(block.number, run), run * self.stream.pairs):
                if self.held_bytes + slot.pair.size > limit:
                    block.num_left_on_disk += 1
                    continue
                block.slots[place] = slot
                self.held_bytes += slot.pair.size
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)


@functools.lru_cache(maxsize=64)
def _episode_order(seed: int, which: int, turn: int, count: int) -> np.ndarray:
    """The order of a set's `count` episodes in its pass number `turn`."""
    return np.random.default_rng((seed, which, turn, ORDER)).permutation(count).astype(np.int32)
