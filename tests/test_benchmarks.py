"""The benchmarks still run after changes of the loop and the models. Their numbers are not judged here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import train_gidm


@pytest.mark.parametrize("plain", [False, True])
def test_a_timed_model_that_counts_goes_through_the_loop(hub: Path, plain: bool) -> None:
    words = ["scale=tiny", f"gidm.vision.path={hub}/dinov2", f"gidm.text.path={hub}/t5"]
    rate, memory = train_gidm.train(words, steps=1, batch_size=4, plain=plain)
    assert rate > 0 and memory > 0
