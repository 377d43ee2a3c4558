"""Frozen encoders: invisible to training, loaded from folders in the hub's format, cached without any difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from common import frozen


def test_frozen_is_invisible_to_optimizers_and_checkpoints_but_moves_with_its_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.foreign = (
                nn.Linear(2, 2),
                frozen.FrozenModule(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))),
            )

    parent = Parent().train()
    assert set(parent.state_dict()) == {"own.weight", "own.bias"} and len(list(parent.parameters())) == 2
    assert not parent.foreign.module.training and not any(p.requires_grad for p in parent.foreign.module.parameters())
    parent.to(torch.float64)
    assert parent.foreign.dtype == torch.float64
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    assert not parent.foreign(x).requires_grad


def test_every_weight_counts_in_the_hash_frozen_ones_too():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.foreign = (
                nn.Linear(2, 2),
                frozen.FrozenModule(nn.Sequential(frozen.FrozenModule(nn.BatchNorm1d(2)), nn.Linear(2, 2, bias=False))),
            )
            self.register_buffer("ids", torch.zeros(3), persistent=False)

    torch.manual_seed(0)
    part = Part()
    known = {frozen.weights_sha256(part)}
    assert known == {frozen.weights_sha256(part)}
    inner = part.foreign.module
    for tensor in (
        part.own.bias,
        part.ids,
        inner[1].weight,
        inner[0].module.weight,
        inner[0].module.running_var,
        inner[0].module.num_batches_tracked,
    ):
        tensor.data.view(-1)[-1:] += 1
        known.add(frozen.weights_sha256(part))
    part.ids = part.ids.half()
    assert len(known | {frozen.weights_sha256(part)}) == 8


def test_clip_and_t5_distinguish_sentences_and_do_not_depend_on_the_batch(hub):
    clip, t5 = frozen.clip_text(hub / "clip"), frozen.t5_text(hub / "t5")
    texts = ["open the drawer", "pull the handle to close the drawer, please"]
    tokens = clip(texts)
    assert tokens.shape == (2, 20, clip.dim) and clip.pooled(texts).shape == (2, clip.pooled_dim)
    assert (clip.pooled(texts)[0] - clip.pooled(texts)[1]).abs().max() > 0.1
    alone = frozen.t5_text(hub / "t5")(texts[:1])
    both, mask = t5(texts)
    length = int(mask[0].sum())
    assert length < both.shape[1] and not both[0, length:].any()
    torch.testing.assert_close(both[0, :length], alone[0][0])


def test_dinov2_gives_one_token_a_patch(hub):
    dino = frozen.dinov2(hub / "dinov2", image_size=64)
    images = torch.rand(2, 3, 80, 100)
    assert dino(images).shape == (2, 64, dino.dim) and dino.num_tokens == 64 and dino.grid == (8, 8)
    changed = images.clone()
    changed[:, :, :, 50:] = 0
    assert (dino(images) - dino(changed)).abs().max() > 0.05


def test_missing_weights_name_the_folder_and_the_command(tmp_path):
    with pytest.raises(frozen.MissingWeights, match=r"hub/tiny/clip; .*common.standins out=.*hub/tiny$"):
        frozen.clip_text(tmp_path / "hub" / "tiny" / "clip")
    with pytest.raises(frozen.MissingWeights, match="download_ckpts.sh t5"):
        frozen.t5_text(tmp_path / "hub" / "t5")


def test_real_tokenizers_load_through_the_same_path(shared_data, hub, tmp_path):
    """The published CLIP and T5 vocabularies load with the functions of common.frozen."""
    from transformers import AutoTokenizer

    clip = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "clip")
    ids = clip(["open the drawer"], padding="max_length", max_length=20)["input_ids"][0]
    assert ids[0] == 49406 and ids[4] == 49407 and len(ids) == 20
    t5 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "t5")
    assert t5(["open the drawer"])["input_ids"][0][-1] == 1


WORDS = "open close push lift the red blue block drawer slowly left right".split()
SENTENCES = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(len(WORDS))]


def rows(encoder: frozen.TextEncoder, texts: list[str]) -> list[torch.Tensor]:
    """The tokens of each sentence without its padding."""
    found = encoder(texts)
    return [tokens[keep] for tokens, keep in zip(*found)] if isinstance(found, tuple) else list(found)


@pytest.mark.parametrize(
    "make", [lambda hub: frozen.t5_text(hub / "t5"), lambda hub: frozen.clip_text(hub / "clip")], ids=["t5", "clip"]
)
def test_a_sentence_is_encoded_once_and_does_not_depend_on_its_batch(
    make: Callable[[Path], frozen.TextEncoder], hub: Path
) -> None:
    encoder, asked = make(hub), []
    real = encoder._encode
    encoder._encode = lambda texts: asked.extend(texts) or real(texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = rows(encoder, SENTENCES)
    rows(encoder, [*SENTENCES, *SENTENCES])
    assert len(asked) == len(SENTENCES)
    for size in (1, 3, 5):  # as runs that resume elsewhere encode them
        encoder = make(hub)
        parts = [row for i in range(0, len(SENTENCES), size) for row in rows(encoder, SENTENCES[i : i + size])]
        assert all(torch.equal(one, two) for one, two in zip(parts, together, strict=True))


@pytest.mark.parametrize(
    "make", [lambda hub: frozen.t5_text(hub / "t5"), lambda hub: frozen.clip_text(hub / "clip")], ids=["t5", "clip"]
)
def test_the_cache_stays_below_its_bound_and_a_dropped_sentence_is_encoded_equally_again(
    make: Callable[[Path], frozen.TextEncoder], hub: Path
) -> None:
    encoder, bounded, asked = make(hub), make(hub), []
    expected = rows(encoder, SENTENCES)
    assert encoder.held == sum(tensor.nbytes for row in encoder.cache.values() for tensor in row) > 0
    bounded.cache_bytes = encoder.held // 3
    real = bounded._encode
    bounded._encode = lambda texts: asked.extend(texts) or real(texts)
    for _ in range(2):  # more sentences in a batch than the cache holds
        assert all(torch.equal(one, two) for one, two in zip(rows(bounded, SENTENCES), expected, strict=True))
        held = sum(tensor.nbytes for row in bounded.cache.values() for tensor in row)
        assert 0 < held == bounded.held <= bounded.cache_bytes
    oldest, *_, newest = bounded.cache
    assert newest == SENTENCES[-1] and SENTENCES[0] not in bounded.cache
    bounded([oldest]), asked.clear()
    bounded([SENTENCES[0], SENTENCES[1], oldest])
    assert asked == SENTENCES[:2], "what was asked for last stays"
