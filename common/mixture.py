"""Weighted mixtures of sample sets, drawn the same way for every (seed, epoch, index) (Tables 11 and 12).

A sample set has `__len__()` and `sample(index, rng) -> dict`, which raises UnreadableSample for a sample that it cannot
read. A set that is too large for random access is a BlockSet: it is read in blocks of neighbouring indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, default_collate

from common.errors import FilteredSample, UnreadableSample, UserError

FILTERED_FACTOR = 50  # filtered draws allowed per damaged one that is allowed: a rule may exclude most of a set


class TooManyUnreadable(UserError):
    """So many samples cannot be read that the data must be repaired before the training goes on."""


class Skipped(NamedTuple):
    """A draw that another one replaced: damaged, or excluded `by_rule`. `line` says which and why."""

    line: str
    by_rule: bool


def skip(skipped: list[Skipped], error: UnreadableSample, tries: int, what: str) -> None:
    """Note in `skipped` a draw that will be replaced; `what` names the kind of draws in the message.

    Raises TooManyUnreadable after `tries` damaged ones in a row, or where rules exclude nearly everything.
    """
    skipped.append(Skipped(str(error), isinstance(error, FilteredSample)))
    damaged = sum(not each.by_rule for each in skipped)
    if damaged >= tries:
        raise TooManyUnreadable(f"{damaged} unreadable {what} in a row, the last: {error}") from error
    if len(skipped) >= FILTERED_FACTOR * tries:
        raise TooManyUnreadable(f"{len(skipped)} {what} in a row were left out, the last: {error}") from error


class SampleSet(Protocol):
    """What the training loop draws from."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]: ...


class BlockReader(Protocol):
    """One process's access to a block set. It keeps what it has read until all of it was drawn."""

    def sample(self, epoch: int, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """As SampleSet.sample. The draws that the reader itself replaced are listed under "skipped", each a Skipped."""


@runtime_checkable
class BlockSet(SampleSet, Protocol):
    """A sample set that is read in blocks: the indices n * block to (n + 1) * block - 1 belong together.

    Block n of epoch e has number e * len / block + n in an endless sequence. A reader is asked for every `stride`-th
    block of that sequence, in order.
    """

    block: int

    def reader(self, seed: int, stride: int) -> BlockReader: ...


class Mixture:
    """Several sample sets as one: every draw picks a set by its weight, then one of its samples uniformly."""

    def __init__(self, sets: Mapping[str, SampleSet], weights: Mapping[str, float], length: int | None = None) -> None:
        unknown = set(weights) - set(sets)
        if unknown:
            raise UserError(f"mixture weights name sets that are not there: {sorted(unknown)}; sets: {sorted(sets)}")
        self.names = [name for name in sets if weights.get(name, 0) > 0]
        empty = [name for name in self.names if not len(sets[name])]
        if empty or not self.names:
            raise UserError(
                f"mixture has nothing to draw from: {'empty sets ' + str(empty) if empty else 'all weights are zero'}"
            )
        self.sets = [sets[name] for name in self.names]
        total = sum(weights[name] for name in self.names)
        self.shares = np.array([weights[name] / total for name in self.names])
        self.length = length or sum(map(len, self.sets))

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random sample. The generator decides which; `index` is not used."""
        chosen = self.sets[rng.choice(len(self.sets), p=self.shares)]
        return chosen.sample(int(rng.integers(len(chosen))), rng)


class SeededDataset(Dataset):
    """A sample set as a torch Dataset: item (epoch, index) is the same sample in every run with the same seed."""

    def __init__(self, samples: SampleSet, seed: int, max_tries: int = 20, stride: int = 1) -> None:
        self.samples, self.seed, self.max_tries = samples, seed, max_tries
        self.block = block_size(samples)
        self.reader = samples.reader(seed, stride) if self.block else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample. The draws that it replaces are listed under "skipped", each a Skipped."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        first, count = (index // self.block * self.block, self.block) if self.block else (0, len(self.samples))
        skipped: list[Skipped] = []
        while True:
            try:
                sample = self.reader.sample(epoch, index, rng) if self.reader else self.samples.sample(index, rng)
                return {**sample, "skipped": skipped + sample.get("skipped", [])}
            except UnreadableSample as error:
                skip(skipped, error, self.max_tries, "samples")
                index = first + int(rng.integers(count))


def block_size(samples: SampleSet) -> int | None:
    """How many neighbouring indices of a sample set are read together; None for random access."""
    return samples.block if isinstance(samples, BlockSet) else None


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and arrays, make tensors of numbers, recurse into dictionaries, keep everything else as lists."""

    def merge(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: merge([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], (str, list, tuple)) or values[0] is None:
            return values
        return default_collate(values)

    return merge(samples)
