"""The loop: a resumed run equals an uninterrupted one, the schedule drives the optimizer in use, EMA is used."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from common.contracts import TrainableModel
from common.errors import NonFiniteLoss, UserError
from common.loop import Loop
from common.mixture import FilteredSample, Mixture, UnreadableSample
from common.sampler import DistributedBatchSampler, validation_batches


class Line:
    """y = 3x with a dropout-sensitive model; samples can be NaN, unreadable, or excluded by a rule."""

    def __init__(
        self,
        length: int = 40,
        poison: int | None = None,
        unreadable: set[int] = frozenset(),
        short: set[int] = frozenset(),
    ) -> None:
        self.length, self.poison, self.unreadable, self.short = length, poison, unreadable, short

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        if index in self.unreadable:
            raise UnreadableSample(f"line/{index}", "torn")
        if index in self.short:
            raise FilteredSample(f"line/{index}", "too short")
        x = np.float32(rng.normal())
        return {
            "id": f"line/{index}",
            "x": torch.tensor([float("nan") if index == self.poison else x]),
            "y": torch.tensor([3 * x]),
        }


class Net(TrainableModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, batch: dict) -> dict:
        noise = torch.randn_like(batch["x"]) * 0.01
        loss = (self.net(batch["x"] + noise) - batch["y"]).square().mean()
        return {"loss": loss, "error": loss.sqrt()}


def make(folder, **changes) -> Loop:
    options = {
        "output_dir": str(folder),
        "seed": 1,
        "max_steps": 12,
        "batch_size": 4,
        "optimizer": {"lr": 1e-2, "weight_decay": 1e-2},
        "schedule": "cosine",
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "save_every": 4,
        "log_every": 2,
    }
    return Loop(**(options | changes))


class Killed(Exception):
    pass


class Dies(Net):
    """Stops after a given optimizer step, as if killed."""

    last = 7

    def on_step_end(self, step: int, accelerator=None) -> dict:
        if step == self.last:
            raise Killed
        return {}


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_resumed_run_equals_straight_run_bit_for_bit(tmp_path, grad_accum_steps):
    straight = make(tmp_path / "a", grad_accum_steps=grad_accum_steps).fit(Net(), Line())
    with pytest.raises(Killed):
        make(tmp_path / "b", grad_accum_steps=grad_accum_steps).fit(Dies(), Line())
    torch.manual_seed(99)
    resumed = make(tmp_path / "b", grad_accum_steps=grad_accum_steps).fit(Net(), Line())
    for a, b in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in "ab"]
    rows = [
        [{k: v for k, v in json.loads(line).items() if k not in ("time", "steps_per_second")} for line in run]
        for run in lines
    ]
    assert [r["step"] for r in rows[1]] == [2, 4, 6, 8, 10, 12]
    assert rows[0] == rows[1]


class Counting(Dies):
    """Returns a metric of integers, the counts of the samples it saw."""

    def forward(self, batch: dict) -> dict:
        seen = torch.bincount(torch.tensor([int(name.split("/")[1]) for name in batch["id"]]), minlength=40)
        return {**super().forward(batch), "seen": seen}

    def metrics_from_counts(self, counts: dict[str, torch.Tensor]) -> dict[str, float]:
        (seen,) = counts.values()
        return {"samples": float(seen.sum()), "different": float((seen > 0).sum())}


def test_counts_are_of_all_batches_between_two_lines_or_of_a_validation(tmp_path):
    """They are not means over batches, training and validation are counted separately, and a resumed run agrees."""

    def run(folder, last):
        model = Counting()
        model.last = last
        make(folder, grad_accum_steps=2, max_steps=10, save_every=5, log_every=5, eval_every=3, eval_batches=3).fit(
            model, Line(), Line(10)
        )
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    rows = run(tmp_path / "whole", None)
    assert [(row["train/samples"], row["train/different"]) for row in rows if "train/loss" in row] == [
        (40, 40),
        (40, 40),
    ]
    assert [(row["val/samples"], row["val/different"]) for row in rows if "val/loss" in row] == [(10, 10)] * 4
    assert not any("seen" in key for row in rows for key in row)
    with pytest.raises(Killed):
        run(tmp_path / "broken", 8)
    again = run(tmp_path / "broken", None)
    assert [{k: v for k, v in row.items() if k not in ("time", "steps_per_second")} for row in again] == [
        {k: v for k, v in row.items() if k not in ("time", "steps_per_second")} for row in rows
    ]


def test_sigterm_saves_and_the_next_run_continues(tmp_path):
    class Signalled(Net):
        def on_step_end(self, step, accelerator):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "b", save_every=None).fit(Signalled(), Line())
    assert stop.value.code == 143 and (tmp_path / "b/resume/step_00000005").is_dir()
    resumed = make(tmp_path / "b", save_every=None).fit(Net(), Line())
    straight = make(tmp_path / "a", save_every=None).fit(Net(), Line())
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_schedule_drives_the_optimizer_in_use(tmp_path):
    """With an endless warm-up the weights must not change; VPP's schedule of another optimizer would have no effect."""
    model = Net()
    before = [p.clone() for p in model.parameters()]
    make(tmp_path, schedule="linear", warmup_steps=10**9, ema_decay=None, max_steps=4).fit(model, Line())
    moved = max((a - b).abs().max().item() for a, b in zip(before, model.parameters()))
    assert moved < 1e-9


def test_ema_is_what_comes_back(tmp_path):
    raw = make(tmp_path / "raw", ema_decay=None).fit(Net(), Line())
    ema = make(tmp_path / "ema", ema_decay=0.9).fit(Net(), Line())
    assert any(not torch.equal(a, b) for a, b in zip(raw.parameters(), ema.parameters()))


def test_validation_does_not_disturb_training(tmp_path):
    with_val = make(tmp_path / "a", eval_every=3).fit(Net(), Line(), Line(8))
    without = make(tmp_path / "b").fit(Net(), Line())
    assert all(torch.equal(a, b) for a, b in zip(with_val.parameters(), without.parameters()))
    assert any("val/loss" in line for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines())


def test_validation_sees_the_same_samples_from_everywhere_in_the_set(tmp_path):
    class Noted(Line):
        seen: list[int] = []

        def sample(self, index, rng):
            self.seen.append(index)
            return super().sample(index, rng)

    make(tmp_path, max_steps=4, eval_every=2, eval_batches=2).fit(Net(), Line(), Noted(1000))
    first, second = Noted.seen[:8], Noted.seen[8:]
    assert first == second and len(set(first)) == 8 and max(first) - min(first) > 300


@pytest.mark.parametrize("length, most", [(1000, 3), (29, 16), (8, 16), (1, 16), (3, 16)])
def test_processes_validate_on_the_same_samples_and_to_the_same_mean(length, most):
    """All get equally many batches, also for a set that is not divisible or has fewer samples than processes."""
    values = np.random.default_rng(0).normal(size=length)

    def look(world):
        ranks = [
            validation_batches(length, 8 // world, seed=1, rank=rank, world=world, most=most) for rank in range(world)
        ]
        assert len({len(chunks) for chunks in ranks}) == 1 and all(keys for chunks in ranks for keys, _ in chunks)
        counted = sorted(index for chunks in ranks for keys, weight in chunks if weight for _, index in keys)
        return counted, np.mean(
            [sum(weight * values[[index for _, index in keys]].mean() for keys, weight in chunks) for chunks in ranks]
        )

    for world in (2, 4, 8):
        alone, others = look(1), look(world)
        assert others[0] == alone[0] and others[1] == pytest.approx(alone[1])
    assert len(alone[0]) == min(length, 8 * most) and alone[1] == pytest.approx(values[alone[0]].mean())


def test_on_best_is_called_while_the_averaged_weights_are_in_place(tmp_path):
    """After a resume it is not called for a worse validation either."""
    val = Line(8)

    def run(folder, model):
        def on_best(step):
            row = [p.detach().clone() for p in model.parameters()]
            told.append((step, row))

        return make(folder, eval_every=1, best="error", save_every=2, optimizer={"lr": 0.2, "weight_decay": 0.0}).fit(
            model, Line(), val, on_best=on_best
        )

    told = []
    last = run(tmp_path / "whole", Net())
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    errors = {row["step"]: row["val/error"] for row in rows if "val/error" in row}
    lowest = [
        step for step in errors if errors[step] < min([errors[s] for s in errors if s < step], default=float("inf"))
    ]
    assert [step for step, _ in told] == lowest and 1 < len(lowest) < len(errors)
    whole, told = told, []
    with pytest.raises(Killed):
        run(tmp_path / "broken", Dies())
    run(tmp_path / "broken", Net())
    for step, weights in told:  # the steps after the last save are repeated, with the same weights
        same = dict(whole)[step]
        assert all(torch.equal(a, b) for a, b in zip(weights, same))
    assert {step for step, _ in told} == set(lowest)
    assert (lowest[-1] == 12) == all(torch.equal(a, b) for a, b in zip(whole[-1][1], last.parameters()))


def test_a_best_metric_that_is_not_reported_is_named(tmp_path):
    with pytest.raises(UserError, match="loop.best=loss_: the model reports no such metric; it reports loss, error"):
        make(tmp_path, eval_every=2, best="loss_").fit(Net(), Line(), Line(8), on_best=print)


def test_non_finite_loss_stops_and_names_the_samples(tmp_path):
    with pytest.raises(NonFiniteLoss, match="line/7"):
        make(tmp_path, max_steps=40).fit(Net(), Line(poison=7))


def test_unreadable_samples_are_counted_and_too_many_stop_the_run(tmp_path):
    make(tmp_path / "few", max_steps=10, max_unreadable_fraction=0.5).fit(Net(), Line(unreadable={3}))
    last = json.loads((tmp_path / "few/metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/skipped"] == 1
    says = (
        r"25\d of \d+ samples were unreadable, more than loop.max_unreadable_fraction=0.05: "
        "repair the data or raise it; the last: line/"
    )
    with pytest.raises(UserError, match=says):
        make(tmp_path / "many", max_steps=100, batch_size=1, save_every=None).fit(
            Net(), Line(unreadable=set(range(30)))
        )


def test_the_first_draws_say_nothing_about_the_share_of_damage(tmp_path):
    make(tmp_path, max_steps=40).fit(Net(), Line(unreadable=set(range(8))))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["data/skipped"] > 20


def test_filtered_samples_are_counted_separately_and_stop_no_run(tmp_path, caplog):
    caplog.set_level("INFO", "common.loop")
    make(tmp_path / "some", max_steps=40, eval_every=40, eval_batches=2).fit(
        Net(), Line(unreadable={39}, short=set(range(35))), Line(8, short={3, 4})
    )
    last = [
        json.loads(line)
        for line in (tmp_path / "some/metrics.jsonl").read_text().splitlines()
        if "data/left_out" in line
    ][-1]
    assert last["data/left_out"] > 500 and 0 < last["data/skipped"] < last["data/left_out"] / 10
    assert any(
        message.startswith(f"{last['data/left_out']} of ")
        and "draws left out by rule and replaced, the last: line/" in message
        for message in caplog.messages
    )
    assert any(
        "held-out samples left out by rule and replaced, the last: line/" in message for message in caplog.messages
    )
    assert (
        sum("unreadable sample replaced: line/39: torn" in message for message in caplog.messages)
        == last["data/skipped"]
    )
    with pytest.raises(UserError, match="1000 samples in a row were left out, the last: line/.*: too short"):
        make(tmp_path / "all").fit(Net(), Line(short=set(range(40))))


def test_unreadable_held_out_samples_are_counted(tmp_path, caplog):
    make(tmp_path, max_steps=2, eval_every=2, eval_batches=10).fit(Net(), Line(), Line(unreadable={3}))
    assert "1 unreadable held-out samples replaced, the last: line/3: torn" in caplog.messages


def test_state_of_another_run_is_refused(tmp_path):
    make(tmp_path).fit(Net(), Line())
    with pytest.raises(UserError, match="another run"):
        make(tmp_path, batch_size=8).fit(Net(), Line())


class Wider(TrainableModel):
    """Another model than Net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, batch: dict) -> dict:
        return {"loss": (self.net(batch["x"]) - batch["y"]).square().mean()}


@pytest.mark.parametrize("changes, model", [({}, Wider), ({"ema_decay": None}, Net), ({"seed": 2}, Net)])
def test_a_resume_folder_of_another_model_or_setting_is_one_line(tmp_path, changes, model):
    make(tmp_path).fit(Net(), Line())
    with pytest.raises(UserError, match="resume/step_00000012: this resume state belongs to another run") as caught:
        make(tmp_path, **changes).fit(model(), Line())
    assert "\n" not in str(caught.value)
    (tmp_path / "resume/step_00000012/run.json").unlink()  # as an older version left it
    with pytest.raises(UserError, match="belongs to another run"):
        make(tmp_path).fit(Net(), Line())


class Attack:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple:
        return os.system, ("false",)


def test_a_resume_state_that_would_run_code_is_refused(tmp_path):
    make(tmp_path).fit(Net(), Line())
    state = next((tmp_path / "resume/step_00000012").glob("custom_checkpoint_*.pkl"))
    torch.save({"step": Attack()}, state)
    with pytest.raises(UserError, match=r"custom_checkpoint_\d+.pkl: holds objects of \w+.system, which no run"):
        make(tmp_path).fit(Net(), Line())


def test_parts_that_do_not_train_belong_to_the_model_of_a_resume_folder(tmp_path):
    make(tmp_path).fit(Net(), Line())
    model = Net()
    model.net[0].bias.requires_grad_(False)
    with pytest.raises(UserError, match="belongs to another run"):
        make(tmp_path).fit(model, Line())


def test_batches_are_a_pure_function_and_ranks_share_an_epoch():
    whole = [list(DistributedBatchSampler(24, 4, seed=3, rank=r, world=2, start=0, stop=6)) for r in range(2)]
    late = list(DistributedBatchSampler(24, 4, seed=3, rank=1, world=2, start=4, stop=6))
    assert late == whole[1][4:]
    first_epoch = [i for rank in whole for batch in rank[:3] for _, i in batch]
    assert sorted(first_epoch) == list(range(24))


def test_mixture_follows_weights_and_refuses_unknown_names():
    mix = Mixture({"a": Line(5), "b": Line(50)}, {"a": 3, "b": 1}, length=100)
    picks = [mix.sample(i, np.random.default_rng(i)) for i in range(400)]
    share = np.mean([int(p["id"].split("/")[1]) < 5 for p in picks])
    assert 0.68 < share < 0.85
    with pytest.raises(UserError, match="not there"):
        Mixture({"a": Line()}, {"c": 1})


@pytest.mark.parametrize("pays, expected", [(True, "bf16"), (False, "no")])
def test_precision_auto_asks_the_machine(tmp_path, monkeypatch, pays: bool, expected: str) -> None:
    monkeypatch.setattr("common.loop.bf16_pays", lambda device: pays)
    loop = make(tmp_path, precision="auto", max_steps=2)
    loop.fit(Net(), Line())
    assert loop.accelerator.mixed_precision == expected


def test_ema_of_sharded_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("common.loop.Accelerator", lambda **_: SimpleNamespace(distributed_type=DistributedType.FSDP))
    with pytest.raises(UserError, match="set loop.ema_decay=null"):
        make(tmp_path).fit(Net(), Line())
