"""Ranks and workers share the streamed pairs, which depend on no process; memory is bounded, records are read once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import rlds
from common.contracts import TrainableModel
from common.errors import UserError
from common.loop import Loop
from common.mixture import Mixture, SeededDataset, TooManyUnreadable
from common.sampler import DistributedBatchSampler, loader
from step2_gidm.data.dataset import build_mixture
from step2_gidm.data.stream import ReadSchedule, StreamingMixture
from step2_gidm.data.transitions import RldsTransitions
from tests.common.test_rlds import record, write_rlds
from tests.step2_gidm.data.test_dataset import PAIRS, silent, video_set

EPISODES, PAIRS_PER_EPISODE = 12, 3  # an episode has four frames at 1 Hz
TOY = {"fps": 1, "image": "observation/image", "text": "instruction", "encoding": "code_points"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_rlds(tmp_path / "toy" / "1.0.0", shards=(6, 7))  # 13 episodes, of which the first is held out


def stream(folder: Path, *, length: int = EPISODES * PAIRS_PER_EPISODE, **options: object) -> StreamingMixture:
    return build_mixture(
        {"toy": {"rlds": folder, **TOY}},
        length=length,
        stream={"block": 6, "pairs": PAIRS_PER_EPISODE, **options},
        **PAIRS,
    )


def batches(
    samples: StreamingMixture,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int = 12,
    num_readers: int = 1,
    size: int = 3,
) -> DistributedBatchSampler:
    return DistributedBatchSampler(
        len(samples),
        size,
        seed=5,
        rank=rank,
        world=world,
        start=start,
        stop=stop,
        block=samples.block,
        num_readers=num_readers,
    )


def read(samples: StreamingMixture, workers: int = 0, **options: object) -> list[dict]:
    return list(loader(samples, batches(samples, num_readers=max(1, workers), **options), workers=workers, pin=False))


def ids(found: list[dict]) -> list[str]:
    return [id for batch in found for id in batch["id"]]


@pytest.mark.parametrize("workers", [0, 3])
def test_ranks_and_workers_share_out_every_pair(toy: Path, workers: int) -> None:
    shares = [ids(read(stream(toy), workers, rank=rank, world=2, stop=6)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 18 and not set(shares[0]) & set(shares[1])
    assert len(set(shares[0] + shares[1])) == EPISODES * PAIRS_PER_EPISODE
    gaps = {id.split("+")[1] for id in shares[0]}
    assert gaps == {"1"}


def test_a_worker_reads_blocks_of_its_own_one_after_another(toy: Path) -> None:
    samples, lanes = stream(toy), {}
    for rank in range(2):
        dealt = batches(samples, rank=rank, world=2, num_readers=3, stop=36)
        for number, batch in enumerate(dealt):
            (block,) = {epoch * samples.num_blocks + index // samples.block for epoch, index in batch}
            lanes.setdefault((rank, number % 3), []).append(block)
    assert len(lanes) == 6 and all(
        lane == sorted(lane) and set(Counter(lane).values()) == {2} for lane in lanes.values()
    )
    assert {b - a for lane in lanes.values() for a, b in itertools.pairwise(sorted(set(lane)))} == {6}, (
        "the next is as far as there are lanes"
    )
    assert sorted(block for lane in lanes.values() for block in set(lane)) == list(range(36))


def test_resumed_in_mid_block_and_in_other_processes_it_is_the_same(toy: Path) -> None:
    whole = read(stream(toy), workers=2, stop=14)
    for start in (1, 7):  # inside a block, and at the border of two workers' batches
        for late, batch in zip(read(stream(toy), workers=2, start=start, stop=14), whole[start:], strict=True):
            assert late["id"] == batch["id"] and torch.equal(late["frames"], batch["frames"])
    here = SeededDataset(stream(toy), seed=5)
    for keys, batch in zip(batches(stream(toy), num_readers=2, stop=14), whole, strict=True):
        assert [here[key]["id"] for key in keys] == batch["id"]


def test_an_epoch_is_drawn_anew(toy: Path) -> None:
    found = ids(read(stream(toy), stop=24))
    first, second = ([frozenset(epoch[i : i + 6]) for i in range(0, 36, 6)] for epoch in (found[:36], found[36:]))
    assert frozenset().union(*first) == frozenset().union(*second) and set(first) != set(second), (
        "other episodes meet in a block"
    )


def test_each_record_is_read_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = rlds.RldsDataset.__getitem__
    monkeypatch.setattr(rlds.RldsDataset, "__getitem__", lambda self, index: opened.append(index) or real(self, index))
    read(stream(toy))
    assert len(opened) == EPISODES + 2 and set(Counter(opened[:EPISODES]).values()) == {1}, (
        "one block of two runs is read ahead"
    )


def test_memory_is_bounded_and_the_bound_changes_nothing_else(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = [
        pair.size
        for i in range(EPISODES)
        for pair in RldsTransitions(toy, **TOY, **PAIRS).sample_pairs(i, np.random.default_rng(0), PAIRS_PER_EPISODE)
    ]
    roomy, tight = stream(toy), stream(toy, buffer_gb=2.5 * max(sizes) / 1e9)
    draws = {"roomy": SeededDataset(roomy, 5), "tight": SeededDataset(tight, 5)}
    caplog.clear()
    for keys in batches(roomy, stop=36):
        for key in keys:
            one, other = (draw[key] for draw in draws.values())
            assert one["id"] == other["id"] and torch.equal(one["frames"], other["frames"])
    assert max(sizes) < draws["tight"].reader.peak_bytes <= tight.buffer_size
    assert 6 * min(sizes) <= draws["roomy"].reader.peak_bytes <= (6 + PAIRS_PER_EPISODE) * max(sizes), (
        "a block and what is read ahead in place of what was drawn"
    )
    assert [message.split(":")[1] for message in caplog.messages] == [
        " 4 of 6 pairs do not fit into the buffer and are read again when drawn; "
        "raise data.stream.buffer_gb or lower data.stream.block (this is said once)"
    ]


def test_sets_come_by_weight_and_episodes_all_once_before_any_again(tmp_path: Path, toy: Path) -> None:
    few = write_rlds(tmp_path / "few" / "1.0.0", shards=(5,))
    sets = {"toy": {"rlds": toy, "weight": 3, **TOY}, "few": {"rlds": few, "weight": 1, **TOY}}
    samples = build_mixture(sets, length=1200, stream={"block": 6, "pairs": PAIRS_PER_EPISODE}, **PAIRS)
    plan = ReadSchedule(samples, seed=1)
    drawn = [plan.episode(block, run) for block in range(3 * samples.num_blocks) for run in range(samples.runs)]
    assert np.mean([which == 0 for which, _ in drawn]) == pytest.approx(0.75, abs=0.03)
    by_draw = {which: {} for which in range(2)}
    for epoch in range(3):
        chosen, draws = plan.draw_epoch(epoch)
        for place in range(plan.runs_per_epoch):
            block, run = divmod(epoch * plan.runs_per_epoch + place, samples.runs)
            by_draw[chosen[place]][int(draws[place])] = plan.episode(block, run)[1]
    for which, count in ((0, EPISODES), (1, 4)):
        episodes = [by_draw[which][draw] for draw in range(len(by_draw[which]))]  # no draw is missing over three epochs
        passes = [episodes[i : i + count] for i in range(0, len(episodes) - count, count)]
        assert all(sorted(one) == list(range(count)) for one in passes) and len(set(map(tuple, passes))) > 15, (
            "in another order each time"
        )


def test_plan_holds_two_epochs_and_can_look_back(toy: Path) -> None:
    samples = stream(toy)
    plan = ReadSchedule(samples, seed=1)
    straight = [plan.episode(block, 0) for block in range(4 * samples.num_blocks)]
    assert [plan.episode(block, 0) for block in reversed(range(4 * samples.num_blocks))] == straight[::-1] and len(
        plan.epochs
    ) == 2


def break_records(folder: Path, episodes: set[int]) -> None:
    for number, path in enumerate(sorted(folder.glob("*.tfrecord-*"))):
        file = rlds.TFRecordFile(path)
        payloads = [b"\x07nonsense" if 6 * number + i in episodes else file[i] for i in range(len(file))]
        path.write_bytes(b"".join(map(record, payloads)))


def test_bad_episodes_are_replaced_and_named(toy: Path) -> None:
    break_records(toy, {4})
    found = read(stream(toy))
    lines = [each.line for batch in found for skipped in batch["skipped"] for each in skipped if not each.by_rule]
    assert len(ids(found)) == 36 and not any(id.startswith("toy/4@") for id in ids(found))
    assert len(lines) == PAIRS_PER_EPISODE and all(
        line.startswith("toy/4: toy/train/4 in ") and "\n" not in line for line in lines
    ), "as many as there were pairs"
    break_records(toy, set(range(13)))
    with pytest.raises(UserError, match="20 unreadable episodes in a row, the last: toy/"):
        read(stream(toy))


def test_episodes_without_a_sentence_and_short_ones_stop_no_run(toy: Path, tmp_path: Path) -> None:
    for path in sorted(toy.glob("*.tfrecord-*")):
        file = rlds.TFRecordFile(path)
        path.write_bytes(b"".join(record(silent(file[i]) if i < 3 else file[i]) for i in range(len(file))))
    short = {"rlds": write_rlds(tmp_path / "short" / "1.0.0", shards=(6,), steps=2), "weight": 1, **TOY, "fps": 4}
    samples = build_mixture(
        {"toy": {"rlds": toy, "weight": 9, **TOY}, "short": short},
        length=36,
        stream={"block": 6, "pairs": PAIRS_PER_EPISODE},
        min_gap=0.25,
        **PAIRS,
    )
    skipped = [each for batch in read(samples) for entries in batch["skipped"] for each in entries]
    assert len(skipped) > 12 and all(each.by_rule and "no instruction under" in each.line for each in skipped)
    with pytest.raises(
        TooManyUnreadable,
        match="1000 episodes in a row were left out, the last: toy/.: 2 frames are too few for pairs 4 apart",
    ):
        read(build_mixture({"short": short}, length=36, stream={"block": 6, "pairs": PAIRS_PER_EPISODE}, **PAIRS))
    run(tmp_path / "run", samples, max_unreadable_fraction=0.0)


def test_a_record_that_decodes_but_was_damaged_is_never_trained_on(toy: Path) -> None:
    path = sorted(toy.glob("*.tfrecord-*"))[0]
    file, data = rlds.TFRecordFile(path), bytearray(path.read_bytes())
    action = next(
        i for i in range(int(file.spans[4][0]), len(data)) if data[i : i + 4] == np.float32(4).tobytes()
    )  # an action of the fifth episode
    data[action] ^= 1
    path.write_bytes(bytes(data))
    found = read(stream(toy))
    lines = {each.line for batch in found for skipped in batch["skipped"] for each in skipped}
    assert not any(id.startswith("toy/4@") for id in ids(found)) and len(ids(found)) == 36
    assert lines == {f"toy/4: {path}: record 4 is corrupt (crc differs); download the shard again"}


def test_a_picture_that_breaks_late_is_replaced_within_its_block(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rlds.decode
    bad = rlds.RldsDataset(toy)[4].encoded("observation/image", 2)

    def decode(image: bytes, what: str) -> np.ndarray:
        return real(image[:40] if image == bad else image, what)

    monkeypatch.setattr(rlds, "decode", decode)
    samples = stream(toy)
    draws = SeededDataset(samples, 5)
    for keys in batches(samples):
        for key in keys:
            sample = draws[key]
            assert not sample["skipped"] or sample["skipped"][0].line.startswith(("toy/4@1+1: ", "toy/4@2+1: "))
            assert draws.reader.current.number == key[1] // samples.block


def test_videos_feed_the_same_stream(tmp_path: Path, toy: Path) -> None:
    sets = {"toy": {"rlds": toy, "weight": 1, **TOY}, "clips": {"video": video_set(tmp_path / "clips", 4), "weight": 1}}
    samples = build_mixture(sets, length=60, stream={"block": 6, "pairs": PAIRS_PER_EPISODE}, **PAIRS)
    found = ids(read(samples, stop=20))
    assert {id.split("/")[0] for id in found} == {"toy", "clips"} and all(
        id.endswith("+10") for id in found if id.startswith("clips")
    )
    reader = samples.reader(5, 1)
    clip = next(n for n, slot in ((n, reader.read_run(n, 0)[0]) for n in range(20)) if slot.set == 1)
    assert (
        len({slot.pair.id for slot in reader.read_run(clip, 0)}) == PAIRS_PER_EPISODE
        and reader.read_run(clip, 0)[0].pair.size == 0
    ), "frames stay in their video"


def test_only_training_streams_and_eval_draws_by_random_access(toy: Path) -> None:
    sets = {"toy": {"rlds": toy, **TOY}}
    assert isinstance(
        build_mixture(sets, split="val", stream={"block": 6, "pairs": PAIRS_PER_EPISODE}, **PAIRS), Mixture
    )
    assert stream(toy).sample(0, np.random.default_rng(0))["id"].startswith("toy/")
    with pytest.raises(UserError, match="1 <= pairs <= block"):
        stream(toy, block=2)
    with pytest.raises(ValueError, match="blocks of 6 give no batches of 8"):
        batches(stream(toy), size=8)


class Grey(TrainableModel):
    """Predicts the brightness of the second frame from that of the first, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, batch: dict) -> dict:
        now, future = batch["frames"].mean((2, 3, 4)).unbind(1)
        return {"loss": (self.net(now[:, None])[:, 0] - future).square().mean()}


def run(
    folder: Path,
    samples: StreamingMixture,
    *,
    stop: int | None = None,
    workers: int = 2,
    max_unreadable_fraction: float = 0.9,
) -> nn.Module:
    trainer = Loop(
        output_dir=str(folder),
        max_steps=9,
        batch_size=3,
        optimizer={"lr": 1e-2, "weight_decay": 0.0},
        log_every=1,
        save_every=None,
        num_workers=workers,
        seed=5,
        max_unreadable_fraction=max_unreadable_fraction,
    )
    if stop:
        trainer._everyone_stops = lambda: trainer.progress.step == stop
    return trainer.fit(Grey(), samples)


def test_a_loop_resumed_in_mid_block_equals_one_unbroken(toy: Path, tmp_path: Path) -> None:
    break_records(toy, {4})
    whole = run(tmp_path / "whole", stream(toy))
    with pytest.raises(SystemExit):
        run(tmp_path / "broken", stream(toy), stop=5)
    with pytest.raises(ValueError, match="'readers': \\(2, 1\\)"):
        run(tmp_path / "broken", stream(toy), workers=0)
    resumed = run(tmp_path / "broken", stream(toy))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert [row["data/skipped"] for row in rows[0]] == [row["data/skipped"] for row in rows[1]] and rows[0][-1][
        "data/skipped"
    ] > 0
