"""Metrics of several steps: the use of codes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.metrics import code_counts, perplexity


def test_codes_are_counted_by_position() -> None:
    codes = torch.randint(0, 9, (40, 3))
    codes[:, 1] = 5
    counts = code_counts(codes, 11)
    assert torch.equal(counts, torch.stack([torch.bincount(column, minlength=11) for column in codes.unbind(1)]))
    assert not counts.is_floating_point(), "the loop adds up integers and averages everything else"
    with (
        FakeTensorMode()
    ):  # tensors without values: reading one would fail here, and would wait for the device on a GPU
        assert code_counts(torch.zeros(40, 3, dtype=torch.long), 11).shape == (3, 11)


def test_perplexity() -> None:
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])).item() == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0])).item() == pytest.approx(1.0)
