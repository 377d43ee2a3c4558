"""The programs of step 2 at toy size: configs compose, training resumes exactly, evaluation writes its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from common import artifact
from common.frozen import t5_text
from common.loop import Loop
from common.rows import load as load_rows
from common.video import probe
from step2_gidm import eval as evaluate
from step2_gidm import train
from step2_gidm.analysis import QUANTIZED
from step2_gidm.data.dataset import build_mixture
from step2_gidm.eval import (
    encode_pairs,
    film_episodes,
    reconstruction_errors,
    reconstruction_table,
    sample_pairs,
    summarize,
)
from step2_gidm.model import GIDM
from step2_gidm.quantizer import VectorQuantizer
from tests.common.test_rlds import write_rlds
from tests.step2_gidm.data.test_dataset import video_set
from tests.step2_gidm.parts import make, moving
from tests.step3_defi.parts import write_calvin

ROOT = Path(__file__).resolve().parents[2]
ROWS = sorted(row.removeprefix("gidm/") for row in load_rows() if row.startswith("gidm/"))
LOOP = {"batch_size": 8, "optimizer": {"lr": 1e-3, "weight_decay": 0.01}, "log_every": 1}


def composed(*overrides: str, config: str = "step2_gidm") -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)


class Squares:
    """Moving squares as a sample set."""

    def __len__(self) -> int:
        return 64

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        batch = moving(1, seed=index)
        return {"id": f"squares/{index}", "frames": batch["frames"][0], "text": batch["text"][0]}


def test_paper_preset() -> None:
    cfg = composed()
    gidm = cfg["gidm"]
    assert (
        gidm["dim"] == 768
        and gidm["encoder_layers"] == 16
        and gidm["quantizer"]["codes"] == 128
        and gidm["text_in"] == ["encoder"]
    )
    assert (
        cfg["loop"]["optimizer"] == {"lr": 1e-4, "weight_decay": 1e-2}
        and cfg["loop"]["epochs"] == 20
        and cfg["loop"]["batch_size"] == 32
    )
    assert (
        cfg["data"]["gap_seconds"] == 1.0 and cfg["data"]["human_fraction"] == 1.0 and cfg["data"]["image_size"] == 224
    )
    assert (
        cfg["data"]["gap"] == "seconds"
        and cfg["data"]["stream"]["buffer_gb"] <= 4
        and cfg["data"]["stream"]["block"] % cfg["loop"]["batch_size"] == 0
    )


def test_official_preset() -> None:
    cfg = composed("experiment=gidm/official")
    gidm = cfg["gidm"]
    assert (gidm["encoder_layers"], gidm["decoder_layers"], gidm["queries"], gidm["text_in"]) == (
        12,
        12,
        4,
        ["encoder", "decoder"],
    )
    assert (gidm["quantizer"]["codes"], gidm["quantizer"]["dim"], gidm["quantizer"]["beta"]) == (16, 128, 0.25)
    assert cfg["loop"]["max_grad_norm"] == 0.1 and cfg["loop"]["batch_size"] == 64 and cfg["data"]["gap"] == "official"


@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
@pytest.mark.parametrize("row", [None, *ROWS])
def test_every_row_composes_and_changes_what_it_claims(row: str | None, scale: str) -> None:
    plain = composed(f"scale={scale}")
    if row is None:
        assert plain["output_dir"] == f"ckpts/gidm/{scale}"
        return
    cfg = composed(f"scale={scale}", f"experiment=gidm/{row}")
    assert cfg["name"] == row
    changed = {key for key in plain if plain[key] != cfg[key]} - {"name", "output_dir"}
    allowed = {"official": {"gidm", "loop", "data"}, "t": {"gidm"}, "f": {"data"}}
    assert changed <= ({"data"} if row == "t5_no_human" else allowed.get(row, allowed.get(row[0])))


@pytest.mark.parametrize("row", ["t7_mlp", "t7_transformer", "t8_binning", "t8_continuous", "t8_gaussian_mixture"])
def test_rows_build(row: str, hub: Path) -> None:
    gidm = composed("scale=tiny", f"experiment=gidm/{row}")["gidm"]
    gidm["vision"]["path"], gidm["text"]["path"] = str(hub / "dinov2"), str(hub / "t5")
    model = instantiate(gidm)
    out = model({"id": ["a"], "frames": torch.rand(1, 2, 3, 64, 64), "text": ["open"]})
    assert torch.isfinite(out["loss"])


@pytest.mark.parametrize(
    "field, values",
    [
        ("encoder_layers", (1, 3)),
        ("decoder_layers", (1, 3)),
        ("quantizer.codes", (4, 9)),
        ("quantizer.dim", (5, 8)),
        ("queries", (2, 3)),
        ("text_in", ([], ["encoder"], ["decoder"], ["encoder", "decoder"])),
    ],
)
def test_every_field_acts(field: str, values: tuple, hub: Path) -> None:
    """What is typed on the command line changes what the model computes."""
    for value in values:
        gidm = composed("scale=tiny", f"gidm.{field}={str(value).replace(' ', '')}", "gidm.residual=false")["gidm"]
        gidm["vision"]["path"], gidm["text"]["path"] = str(hub / "dinov2"), str(hub / "t5")
        torch.manual_seed(0)
        model = instantiate(gidm).eval()
        ran: list[nn.Module] = []
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.register_forward_hook(lambda block, *_, ran=ran: ran.append(block))
        now, future = torch.randn(2, 16, model.num_tokens, model.embed_dim)
        one, two = (["open the drawer"] * 16, ["push the red block left"] * 16)
        action = model.infer(now, future, one)
        decoded = model.decode(now, action.quantized, one)
        depth = {
            side: sum(block in set(getattr(model, side).blocks) for block in ran) for side in ("encoder", "decoder")
        }
        seen = {
            "encoder_layers": depth["encoder"],
            "decoder_layers": depth["decoder"],
            "quantizer.dim": action.quantized.shape[2],
            "quantizer.codes": model.quantizer.size,
            "queries": action.codes.shape[1],
            "text_in": [
                name
                for name, (a, b) in {
                    "encoder": (action.continuous, model.infer(now, future, two).continuous),
                    "decoder": (decoded, model.decode(now, action.quantized, two)),
                }.items()
                if not torch.equal(a, b)
            ],
        }
        assert seen[field] == value
        assert decoded.shape == future.shape and action.codes.max() < model.quantizer.size == len(
            model.quantizer.codebook
        )


def test_real_data_trains(shared_data: Path, hub: Path, tmp_path: Path) -> None:
    sets = {
        "bridge_rlds": {
            "rlds": shared_data / "rlds_samples/bridge_dataset/1.0.0",
            "fps": 5,
            "image": "observation/image_0",
        },
        **{
            name: {"video": shared_data / "video_samples" / name, "only_split": "val", "fps": fps}
            for name, fps in (("bridge", 5.0), ("rt1", 3.0), ("sthv2", None))
        },
    }
    gidm = composed("scale=tiny")["gidm"]
    gidm["vision"]["path"], gidm["text"]["path"] = str(hub / "dinov2"), str(hub / "t5")
    data = {"image_size": 64, "length": 64}
    loop = Loop(output_dir=str(tmp_path / "run"), max_steps=12, eval_every=12, eval_batches=1, **LOOP)
    loop.fit(instantiate(gidm), build_mixture(sets, augment=True, **data), build_mixture(sets, split="val", **data))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/mse" in row]
    error, copied = (sum(row[f"train/{key}"] for row in steps[6:]) for key in ("mse", "copy_mse"))
    assert len(steps) == 12 and error < 0.99 * copied and all(row["data/skipped"] == 0 for row in steps)
    by_query = {
        f"{split}/{what}_{query}"
        for split in ("train", "val")
        for what in ("usage", "perplexity")
        for query in range(4)
    }
    assert {"val/mse", "val/copy_mse", "val/gap", "val/usage", "val/perplexity", *by_query} <= set().union(*rows)


def test_resume_equals_unbroken(hub: Path, tmp_path: Path) -> None:
    class WithSentences(Squares):
        """With sentences of different lengths, which a resumed run encodes again, in batches of other sentences."""

        def sample(self, index: int, rng: np.random.Generator) -> dict:
            return {**super().sample(index, rng), "text": f"push block {index}" + " to the left" * (index % 11)}

    def run(folder: str, steps: int, total: int) -> GIDM:
        torch.manual_seed(0)
        loop = Loop(output_dir=str(tmp_path / folder), max_steps=total, save_every=3, schedule="constant", **LOOP)
        if steps < total:  # stop in the way of SIGTERM
            loop._everyone_stops = lambda: loop.progress.step == steps
        model = make(dim=16, encoder_layers=1, decoder_layers=1)
        model.text = t5_text(hub / "t5")
        model.text_proj = nn.Linear(model.text.dim, 16)
        return loop.fit(model, WithSentences())

    whole = run("whole", 14, 14)
    with pytest.raises(SystemExit):
        run("broken", 7, 14)
    resumed = run("broken", 14, 14)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def code_use(row: dict[str, float]) -> dict[str, float]:
    """The metrics of the codes in a row of metrics.jsonl."""
    return {
        key: pytest.approx(value)
        for key, value in row.items()
        if key.split("/")[-1].startswith(("usage", "perplexity"))
    }


def test_logged_code_use_is_that_of_the_model_on_all_held_out_pairs(tmp_path: Path) -> None:
    """Not that of one batch, whose four latent actions can use at most four codes."""
    every, model = moving_all(Squares()), make(quantizer=VectorQuantizer(128, 6))
    with torch.no_grad():
        z = model.infer(*model.embed_pair(every["frames"]), every["text"]).continuous
        model.quantizer.codebook.copy_(z.flatten(0, 1))
    still = {"batch_size": 2, "optimizer": {"lr": 0.0, "weight_decay": 0.0}}
    model = Loop(output_dir=str(tmp_path / "run"), max_steps=1, eval_every=1, eval_batches=99, **(LOOP | still)).fit(
        model, Squares(), Squares()
    )
    said = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    with torch.no_grad():
        counts = model(every)["codes"]
    assert {key.removeprefix("val/"): value for key, value in code_use(said).items()} == model.metrics_from_counts(
        {"codes": counts}
    )
    assert said["val/usage"] > 4 / 128


def moving_all(samples: Squares) -> dict:
    """All samples in one batch."""
    rows = [samples.sample(i, np.random.default_rng(0)) for i in range(len(samples))]
    return {
        "id": [row["id"] for row in rows],
        "frames": torch.stack([row["frames"] for row in rows]),
        "text": [row["text"] for row in rows],
    }


def launched(folder: Path, sets: Path, processes: int) -> dict[str, tuple[dict[str, torch.Tensor], list[dict]]]:
    """kind of set -> (weights, rows of metrics.jsonl) of train_distributed.py."""
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--master_port=29879",
        str(Path(__file__).with_name("train_distributed.py")),
        str(sets),
        str(folder),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "disabled",
    }
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    return {
        kind: (
            torch.load(folder / f"{kind}.pt", weights_only=True),
            [json.loads(line) for line in (folder / kind / "metrics.jsonl").read_text().splitlines()],
        )
        for kind in ("drawn", "streamed")
    }


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path: Path) -> None:
    write_rlds(tmp_path / "toy" / "1.0.0", shards=(6, 7))
    alone, pair = (launched(tmp_path / str(processes), tmp_path / "toy" / "1.0.0", processes) for processes in (1, 2))
    for kind, (weights, lines) in alone.items():
        others, found = pair[kind]
        assert [code_use(row) for row in found] == [code_use(row) for row in lines] and len(code_use(lines[-1])) == 6, (
            kind
        )
        lines, found = lines[:-1], found[:-1]  # the last row is that of the validation
        assert len(lines) == 5 and len({row["train/loss"] for row in lines}) == 5
        for one, two in zip(lines, found, strict=True):
            assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4) and two[
                "grad_norm"
            ] == pytest.approx(one["grad_norm"], rel=1e-3), kind
        start = torch.load(tmp_path / "1" / "start.pt", weights_only=True)
        apart, way = (
            sum((weights[key] - other[key]).square().sum() for key in weights).sqrt() for other in (others, start)
        )
        assert apart < 0.01 * way, f"{kind}: as far apart as rounding drives Adam"


def test_measure_knows_a_perfect_and_a_blind_model() -> None:
    model = make().eval()
    pairs = [Squares().sample(i, np.random.default_rng(0)) for i in range(10)]
    model.decode = lambda now, latent, text=None: now
    seen = encode_pairs(model, pairs, batch_size=4)
    errors, codes = reconstruction_errors(model, pairs, seen, batch_size=4), seen.codes.numpy()
    assert np.allclose(errors["mse"], errors["copy_mse"]) and np.allclose(errors["gap"], 0) and codes.shape == (10, 2)
    summary = summarize(errors, codes, 8)
    assert summary["codes"]["used"] == len(np.unique(codes)) and len(summary["codes"]["perplexity_by_query"]) == 2
    text = reconstruction_table(summary, 10)
    assert summary["codes"]["used_by_query"] == [len(np.unique(codes[:, query])) for query in range(2)]
    assert "no change" in text and f"Codes in use: {summary['codes']['used']} of 8 (by query: " in text


def test_pairs_need_data() -> None:
    pairs, skipped = sample_pairs(Squares(), 5, 0)
    again, _ = sample_pairs(Squares(), 5, 0)
    assert [p["id"] for p in pairs] == [p["id"] for p in again] and not skipped
    with pytest.raises(ValueError, match="2 are needed"):
        sample_pairs(Squares(), 1, 0)


def test_films_of_every_kind_of_set(tmp_path: Path) -> None:
    toy = {
        "rlds": write_rlds(tmp_path / "toy" / "1.0.0"),
        "fps": 1,
        "image": "observation/image",
        "text": "instruction",
        "encoding": "code_points",
    }
    sets = {
        "toy": toy,
        "calvin": {"calvin": write_calvin(tmp_path / "calvin", recordings=2) / "training", "fps": 10},
        "short": {"video": video_set(tmp_path / "short", 2, length=3)},
    }
    cfg = OmegaConf.create({"films": 1, "film_steps": 4, "fps": 8, "batch_size": 4})
    notes = film_episodes(make().eval(), build_mixture(sets, image_size=16, labelled=True), tmp_path / "films", cfg)
    assert {path.name: probe(path)[0] for path in (tmp_path / "films").iterdir()} == {
        "toy_000.mp4": 3,
        "calvin_000.mp4": 4,
    }
    assert notes == ["No film of short/1: 3 frames are too few for pairs 10 apart (min_gap=0.5)."]


def test_train_then_eval_from_the_command_line(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(program: ModuleType, *overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", [program.__name__, *overrides])
        program.main()

    video_set(tmp_path / "data/playtable/ABC/videos_set", 6, length=40, fps=30, views=2)
    video_set(tmp_path / "data/playtable/hand/videos_set", 6, length=40, fps=30)
    for scene in "BC":
        with_states(video_set(tmp_path / scene, 40, length=16, fps=8))
    where = [f"paths.data={tmp_path / 'data'}", f"paths.ckpts={tmp_path / 'ckpts'}"]
    build = [f"gidm.vision.path={hub / 'dinov2'}", f"gidm.text.path={hub / 't5'}", "gidm.encoder_layers=1"]
    short = [
        "scale=tiny",
        "loop.max_steps=3",
        "loop.batch_size=4",
        "loop.eval_every=3",
        "loop.eval_batches=1",
        "name=toy",
    ]
    run(train, *where, *build, *short)
    folder = tmp_path / "ckpts/gidm/toy"
    assert artifact.read_meta(folder, "gidm")["step"] == 3 and artifact.read_meta(folder)["scale"] == "tiny"
    run(evaluate, *where, "scale=tiny", f"path={folder}", "pairs=6", "pictures=1", "~data.sets.hand")
    results = json.loads((folder / "eval/results.json").read_text())
    assert results["pairs"] == 6 and len(results["samples"]) == 6 and results["gidm_sha256"] == artifact.sha256(folder)
    assert (folder / "eval/table.md").read_text().startswith("Mean squared error") and (
        folder / "eval/attention/000.png"
    ).stat().st_size > 1000
    assert (folder / "eval/curves.png").stat().st_size > 1000
    said = (folder / "eval/table.md").read_text()
    assert (
        "all pairs are of one scene" in said
        and "the data hold no readings" in said
        and set(results).isdisjoint({"motion", "transfer"})
    )
    assert probe(folder / "eval/attention/robot_000.mp4")[0] == 10
    sets = ["~data.sets.robot", "~data.sets.hand", *(f"+data.sets.{scene}.video={tmp_path / scene}" for scene in "BC")]
    out = tmp_path / "meaning"
    run(
        evaluate,
        *where,
        "scale=tiny",
        f"path={folder}",
        *sets,
        f"out={out}",
        "pairs=40",
        "probe=120",
        "films=1",
        "film_steps=3",
        "pictures=3",
    )
    results, said = json.loads((out / "results.json").read_text()), (out / "table.md").read_text()
    assert not results["notes"] and "Linear probes" in said and "Transfer" in said and "Neighbours" in said
    assert results["motion"]["0"]["motion"]["pairs"][2] == 40 and set(results["motion"]["0"]) == {"motion", "gripper"}
    assert results["transfer"]["pairs"] > 10 and results["retrieval"]["sentence"][QUANTIZED]["queries"] == 40
    drawn = ("neighbours.png", "transfer.png", "attention/002.png", "attention/B_000.mp4", "attention/C_000.mp4")
    assert all((out / name).stat().st_size > 1000 for name in drawn)
    bare = tmp_path / "bare"
    run(
        evaluate,
        *where,
        "scale=tiny",
        f"path={folder}",
        *sets,
        f"out={bare}",
        "pairs=40",
        "probe=120",
        "films=0",
        "pictures=0",
    )
    assert (bare / "table.md").read_text() == said and not [*bare.rglob("*.png"), *bare.rglob("*.mp4")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_can_read_nothing_ends_with_one_line(
    workers: int, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_rlds(tmp_path / "toy" / "1.0.0", shards=(6, 7))
    build = [
        f"gidm.vision.path={hub / 'dinov2'}",
        f"gidm.text.path={hub / 't5'}",
        f"paths.ckpts={tmp_path / 'ckpts'}",
        f"loop.num_workers={workers}",
    ]
    sets = f"+data.sets.toy={{rlds:{folder},fps:1,image:observation/image,text:language_instruction}}"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train",
            "scale=tiny",
            *build,
            "~data.sets.robot",
            "~data.sets.hand",
            sets,
            "validate=false",
            "loop.max_steps=2",
        ],
    )
    with pytest.raises(
        SystemExit,
        match=r"^error: 20 unreadable samples in a row, the last: toy/\d+: toy/train/\d+: no feature "
        r"'language_instruction'; at 'language_instruction' there are \['action', 'instruction', 'observation'\]$",
    ):
        train.main()


def with_states(folder: Path) -> Path:
    """Add readings of a robot and two sentences to the set of test_dataset.video_set."""
    for i, file in enumerate(sorted((folder / "annotation").glob("*/*.json"))):
        state = np.random.default_rng(i).normal(size=(16, 15)).cumsum(0)
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "state": state.tolist(), "texts": [f"task {i // 20 % 2}"]})
        )
    return folder
