"""The analysis of latent actions on constructed data, where the true answer is known.

It has to find what is there and nothing else, and must never fit on test episodes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.probe import ProbeSplit
from common.video import write_mp4
from step2_gidm import analysis
from step2_gidm.analysis import (
    CONTINUOUS,
    NO_TEXT,
    PIXELS,
    QUANTIZED,
    RANDOM,
    TOKENS,
    EncodedPairs,
    Labels,
    MissingLabels,
)
from step2_gidm.data.transitions import VideoTransitions
from tests.step2_gidm.parts import make

TASKS = ["open", "close", "lift", "push"]


def labels(
    episodes: int, pairs: int, *, prefix: str = "e", motion: np.ndarray | None = None, scenes: int = 1
) -> Labels:
    """Labels of `pairs` pairs in each of `episodes` episodes; tasks and scenes alternate."""
    number = np.repeat(np.arange(episodes), pairs)
    count = len(number)
    names, where = np.char.add(prefix, number.astype(str)), np.char.add("scene", (number // 4 % scenes).astype(str))
    motion = np.full((count, 3), np.nan) if motion is None else motion
    return Labels(
        np.array(TASKS)[number % len(TASKS)],
        names,
        where,
        np.zeros(count, int),
        np.tile(np.linspace(0, 1, pairs), episodes),
        motion,
        np.full((count, 1), np.nan),
    )


def motion_from(codes: Tensor) -> np.ndarray:
    """Displacements (P, 3) that two codes out of eight determine, with a little noise."""
    table = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1)) * 0.05
    return (table[0, codes[:, 0]] + table[1, codes[:, 1]] + 0.005 * torch.randn(len(codes), 3)).double().numpy()


def representations_of(codes: Tensor) -> dict[str, Tensor]:
    """Representations of which only the latent action carries the codes."""
    book = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    latent = book[codes].flatten(1)
    noise = {TOKENS: torch.randn(len(codes), 40), PIXELS: torch.randn(len(codes), 9)}
    return {CONTINUOUS: latent + 0.01 * torch.randn_like(latent), QUANTIZED: latent, **noise}


def test_the_read_out_finds_motion_in_codes_that_decide_it_and_nowhere_else() -> None:
    fit, test = torch.randint(8, (800, 2)), torch.randint(8, (200, 2))
    known = labels(100, 8, motion=motion_from(fit)), labels(25, 8, prefix="t", motion=motion_from(test))
    results = analysis.probe_motion(representations_of(fit), known[0], representations_of(test), known[1], seed=0)
    assert set(results) == {"0"} and set(results["0"]) == {"motion"}, "nothing is said of a gripper that nobody read"
    rows = results["0"]["motion"]["r2"]
    assert rows[QUANTIZED]["low"] > 0.6 and rows[CONTINUOUS]["low"] > 0.6
    for name in (TOKENS, PIXELS, RANDOM):
        assert rows[name]["mean"] < 0.1 and rows[name]["low"] < 0, name
        lead = results["0"]["motion"]["lead"][name]
        assert (
            lead["mean"] == pytest.approx(rows[CONTINUOUS]["mean"] - rows[name]["mean"])
            and 0.5 < lead["low"] < lead["mean"] < lead["high"]
        )
    assert results["0"]["motion"]["pairs"] == [600, 200, 200]


def test_the_gripper_is_read_where_it_moves() -> None:
    codes = torch.randint(8, (300, 2))
    change = (codes[:, :1] > 3).double().numpy() * 0.08
    fit, test = (
        labels(*size)._replace(gripper=rows) for size, rows in (((25, 8), change[:200]), ((20, 5), change[200:]))
    )
    fit = fit._replace(episode=np.char.add("f", fit.episode))
    inputs = representations_of(codes[:200]), representations_of(codes[200:])
    rows = analysis.probe_motion(inputs[0], fit, inputs[1], test, seed=0)["0"]["gripper"]["r2"]
    assert rows[QUANTIZED]["low"] > 0.4 > 0.15 > rows[RANDOM]["mean"]
    for other in (
        test._replace(view=np.ones(100, int)),
        test._replace(gripper=0 * test.gripper),
    ):  # a camera that was not fitted on; a gripper that does not move
        with pytest.raises(MissingLabels, match="too few pairs hold readings"):
            analysis.probe_motion(
                inputs[0], fit._replace(gripper=fit.gripper * other.gripper.any()), inputs[1], other, seed=0
            )


def fingerprints(known: Labels) -> dict[str, Tensor]:
    """Latent actions that identify the episode and carry nothing else."""
    names, number = np.unique(known.episode, return_inverse=True)
    latent = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(int(name[1:]))) for name in names])[
        number
    ]
    return {CONTINUOUS: latent, QUANTIZED: latent, TOKENS: latent, PIXELS: latent}


def test_an_episode_that_is_measured_is_never_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    motion = np.random.default_rng(0).normal(size=(60, 3)).repeat(6, 0) * 0.05  # one displacement an episode
    fit = labels(60, 6, motion=motion)
    test = labels(60, 6, motion=motion)  # the same episodes, of which a third is measured
    third = np.arange(240, 360)
    test = Labels(*(column[third] for column in test))
    parts = analysis.split_by_episode(fit.episode, test.episode, 0)
    own = np.concatenate([fit.episode, test.episode])
    fitted, choosing, measured = (set(own[part]) for part in parts)
    assert (
        not fitted & measured
        and not fitted & choosing
        and not choosing & measured
        and len(choosing) == 10
        and len(fitted) == 30
    )
    honest = analysis.probe_motion(fingerprints(fit), fit, fingerprints(test), test, seed=0)["0"]["motion"]["r2"][
        QUANTIZED
    ]
    assert honest["mean"] < 0.2, "what an episode looks like says nothing of how another one moves"

    def leaky(fit: np.ndarray, test: np.ndarray, seed: int) -> ProbeSplit:
        last = np.arange(len(fit)) % 6 == 5
        return ProbeSplit(np.flatnonzero(~last), np.flatnonzero(last), len(fit) + np.arange(len(test)))

    monkeypatch.setattr(analysis, "split_by_episode", leaky)
    leaked = analysis.probe_motion(fingerprints(fit), fit, fingerprints(test), test, seed=0)["0"]["motion"]["r2"][
        QUANTIZED
    ]
    assert leaked["mean"] > 0.8, "a split by pair would be believed"


def test_neighbours_are_the_planted_ones_of_other_episodes() -> None:
    known = labels(24, 5, motion=np.eye(4, 3)[np.repeat(np.arange(24), 5) % 4] * 0.1 + 1e-9)
    task = torch.from_numpy(np.unique(known.text, return_inverse=True)[1])
    episode = torch.arange(24).repeat_interleave(5)
    by_task = torch.eye(4)[task] * 10 + torch.randn(24, 4)[episode] * 0.1  # nearer within an episode than between two
    values = {CONTINUOUS: by_task, QUANTIZED: torch.eye(4)[task], PIXELS: torch.randn(120, 5)}
    found = analysis.find_neighbours(values[QUANTIZED], by_task, known, 4)
    assert (known.episode[found] != known.episode[:, None]).all() and (known.text[found] == known.text[:, None]).all()
    assert all(len(set(row)) == 4 for row in known.episode[found]), "similar pairs of one episode count once"
    ties = torch.cdist(by_task, by_task)
    ties[torch.from_numpy(known.episode[:, None] == known.episode)] = torch.inf
    assert (known.episode[found[:, 0]] == known.episode[ties.argmin(1).numpy()]).all(), (
        "equal codes are told apart by the continuous latent action"
    )
    results = analysis.measure_retrieval(
        {source: analysis.find_neighbours(x, by_task, known, 4) for source, x in values.items()}, known
    )
    for name in (CONTINUOUS, QUANTIZED):
        assert results["sentence"][name]["value"]["mean"] == 1 and results["sentence"][name]["gain"]["low"] > 0.7
    chance = results["sentence"][PIXELS]
    assert chance["gain"]["low"] < 0 < chance["gain"]["high"] and chance["chance"] == pytest.approx(5 / 23)
    assert (
        results["displacement"][QUANTIZED]["value"]["mean"] > 0.99
        and results["displacement"][PIXELS]["value"]["mean"] < 0.5
    )


def test_neighbours_are_of_the_same_camera_and_may_be_too_few() -> None:
    known = labels(4, 2)._replace(view=np.array([0, 1] * 4))
    found = analysis.find_neighbours(torch.randn(8, 3), torch.zeros(8, 3), known, 5)
    assert (found[:, 3:] == -1).all() and (known.view[found[:, :3]] == known.view[:, None]).all()


def test_retrieval_needs_something_to_compare() -> None:
    known = labels(4, 3)
    with pytest.raises(MissingLabels, match="no two episodes share a sentence"):
        analysis.measure_retrieval({CONTINUOUS: np.zeros((12, 2), int)}, known._replace(text=known.episode))


def transferable(scenes: int) -> tuple[torch.nn.Module, EncodedPairs, Labels]:
    """A model whose latent action adds its change to any frame; each task has an action, and scenes look different."""
    known = labels(16, 3, scenes=scenes)
    task = torch.from_numpy(np.unique(known.text, return_inverse=True)[1])
    scene = torch.from_numpy(np.unique(known.scene, return_inverse=True)[1])
    actions, changes = torch.randn(4, 2, 6), torch.randn(4, 16, 16)
    now = torch.randn(scenes, 16, 16)[scene] * 5 + 0.01 * torch.randn(48, 16, 16)
    model = make().eval()
    found = {tuple(action.flatten().tolist()): change for action, change in zip(actions, changes)}
    model.decode = lambda now, action, text: now + torch.stack([found[tuple(one.flatten().tolist())] for one in action])
    return model, EncodedPairs(now, now + changes[task], actions[task], actions[task], None, None), known


def test_an_action_carries_over_to_another_scene() -> None:
    model, encoded, known = transferable(2)
    partners = analysis.find_transfer_pairs(known, 0)
    assert len(partners.target) == 48 and (known.scene[partners.source] != known.scene[partners.target]).all()
    assert (known.text[partners.source] == known.text[partners.target]).all() and (
        known.text[partners.other] != known.text[partners.target]
    ).all()
    assert all(
        (known.phase[chosen] == known.phase[partners.target]).all() for chosen in (partners.source, partners.other)
    )
    results = analysis.measure_transfer(model, encoded, known, partners, batch_size=16)
    assert (
        results["same"]["mean"] > 0.999
        and results["own"]["mean"] > 0.999
        and abs(results["other"]["mean"]) < 0.3
        and results["gain"]["low"] > 0.4
    )
    assert (
        results["sentence_gain"]["low"] > 0.6 and (known.scene[partners.shuffled] != known.scene[partners.target]).all()
    )
    tokens = analysis.decode_transferred(model, encoded, known, partners.target[:1], partners.source[:1])[0]
    pair, moment = analysis.nearest_frame(encoded, known, tokens, int(partners.target[0]))
    target = partners.target[0]
    assert moment == 1 and known.text[pair] == known.text[target] and known.scene[pair] == known.scene[target]
    assert analysis.nearest_frame(encoded, known, encoded.now[target], int(target)) != (target, 0), (
        "the present frame is no answer"
    )


def test_transfer_needs_two_scenes_with_a_task_in_common() -> None:
    with pytest.raises(MissingLabels, match="all pairs are of one scene"):
        analysis.find_transfer_pairs(transferable(1)[2], 0)
    known = transferable(2)[2]
    with pytest.raises(MissingLabels, match="scenes share no sentence"):
        analysis.find_transfer_pairs(known._replace(text=np.char.add(known.text, known.scene)), 0)


def square_set(folder: Path, split: str, count: int, seed: int) -> Path:
    """Clips of a square that moves at random, with its position as the robot's readings."""
    rng = np.random.default_rng(seed)
    (folder / "annotation" / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        place = (
            np.clip(rng.uniform(4, 44, 2) + np.cumsum(rng.normal(0, 1, 2) + rng.normal(0, 1.5, (16, 2)), 0), 0, 48)
            .round()
            .astype(int)
        )
        frames = np.zeros((16, 64, 64, 3), np.uint8)
        for frame, (y, x) in zip(frames, place):
            frame[y : y + 16, x : x + 16] = 200
        write_mp4(folder / f"videos/{split}/{i}.mp4", frames, 8, crf=0)
        state = np.zeros((16, 15))
        state[:, :2] = place / 100
        record = {"texts": ["wander"], "videos": [{"video_path": f"videos/{split}/{i}.mp4"}], "state": state.tolist()}
        (folder / f"annotation/{split}/{i:03d}.json").write_text(json.dumps(record))
    return folder


def test_motion_is_read_out_of_real_pictures(tmp_path: Path) -> None:
    square_set(square_set(tmp_path / "set", "train", 50, 0), "val", 15, 1)
    model = make(text_in=("decoder",)).eval()
    place = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).view(16, 2)

    def centre(now: Tensor, future: Tensor, *_: object) -> Tensor:
        """The true answer: how far the centre of brightness moved."""
        return torch.cat(
            [((future - now).transpose(1, 2) @ place).transpose(1, 2), torch.zeros(len(now), 2, 16)], dim=2
        )

    model.encode = centre
    sides = []
    for split, count in (("train", 250), ("val", 90)):
        samples, rng = VideoTransitions(tmp_path / "set", split, image_size=32, labelled=True), np.random.default_rng(0)
        pairs = [samples.sample(i % len(samples), rng) for i in range(count)]
        encoded = analysis.encode_batch(model, pairs)
        sides += [analysis.representations(model, encoded, pairs), analysis.read_labels(pairs)]
    results = analysis.probe_motion(*sides, seed=0)
    assert encoded.no_text is None and set(results["0"]) == {"motion"}, "this gripper is read and never moves"
    rows = results["0"]["motion"]["r2"]
    assert (
        rows[CONTINUOUS]["low"] > 0.95 and rows[RANDOM]["mean"] < 0.1 and rows[PIXELS]["mean"] < rows[CONTINUOUS]["low"]
    )


def test_the_sentence_can_be_withheld() -> None:
    model = make().eval()
    pairs = [
        {"id": str(i), "frames": torch.rand(2, 3, 16, 16), "text": text} for i, text in enumerate(("open", "close", ""))
    ]
    encoded = analysis.encode_batch(model, pairs)
    assert torch.allclose(encoded.no_text[2], encoded.continuous[2], atol=1e-6) and not torch.allclose(
        encoded.no_text[0], encoded.continuous[0], atol=1e-3
    )
    assert NO_TEXT in analysis.representations(model, encoded, pairs) and analysis.embed_sentences(
        model, ["open", "close"]
    ).shape == (
        2,
        8,
    )
    assert (
        analysis.read_labels(pairs).episode.tolist() == ["0", "1", "2"]
        and np.isnan(analysis.read_labels(pairs).motion).all()
    )
