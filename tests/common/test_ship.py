"""Shipped models are half the size, with equal outputs up to fp16 rounding; changed bytes are found."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from common import artifact
from common.artifact import ArtifactError
from common.ship import ship
from tests.step3_defi.parts import PARENT_CONFIGS, configure

ROW = {"step": 3, "val/loss": 0.25, "val/codes_used": 7.0, "train/loss": None}


@pytest.fixture(scope="module")
def trained(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both tiny models, with the other files that a training writes."""
    root, made = tmp_path_factory.mktemp("trained"), {}
    (root / "hub").mkdir()
    (root / "hub/tiny").symlink_to(hub)
    for kind, program in PARENT_CONFIGS.items():
        config = OmegaConf.to_container(configure(program, f"paths.ckpts={root}")[kind], resolve=True)
        own = {"svd": artifact.HERE} if kind == "gfdm" else {}
        folder = made[kind] = artifact.save(
            instantiate(config), root / kind, kind=kind, config={**config, **own}, step=3, scale="tiny", stats={"x": 1}
        )
        for place in ("resume", "eval", "hydra"):
            (folder / place).mkdir()
            (folder / place / "state.bin").write_bytes(bytes(1000))
        (folder / "metrics.jsonl").write_text(
            json.dumps(ROW) + "\n" + json.dumps({"step": 4, "train/loss": 1.0}) + "\n"
        )
    return made


def rounded(model: nn.Module) -> nn.Module:
    """The model with every weight rounded to fp16."""
    model.load_state_dict(
        {
            key: value.half().to(value.dtype) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
    )
    return model


def weights_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@torch.no_grad()
def test_a_forward_model_is_equal_up_to_fp16_rounding(trained: dict[str, Path], tmp_path: Path) -> None:
    shipped = ship(trained["gfdm"], tmp_path / "shipped")
    before, after = artifact.load(trained["gfdm"], "gfdm"), artifact.load(shipped, "gfdm")
    assert {tensor.dtype for model in (after, after.vae.module) for tensor in model.state_dict().values()} == {
        torch.float32
    }
    image, text = (
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        ["open the drawer", "go"],
    )
    exact, found = before.imagine(image, text), after.imagine(image, text)
    assert not torch.equal(found, exact) and (found - exact).norm() < 1e-2 * exact.norm()
    rounded(before)
    assert torch.equal(before.imagine(image, text), found), "the VAE's weights are shipped in fp16 already"
    assert weights_of(shipped) < 0.51 * weights_of(trained["gfdm"]) < 9e6


@torch.no_grad()
def test_an_inverse_model_is_equal_up_to_fp16_rounding(trained: dict[str, Path], tmp_path: Path) -> None:
    shipped = ship(trained["gidm"], tmp_path / "shipped")
    before, after = artifact.load(trained["gidm"], "gidm"), artifact.load(shipped, "gidm")
    tokens = before.embed(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    exact, found = (
        model.infer(tokens, tokens.flip(0), ["open the drawer", "go"]).continuous for model in (before, after)
    )
    assert not torch.equal(found, exact) and (found - exact).norm() < 1e-2 * exact.norm()
    assert torch.equal(rounded(before).infer(tokens, tokens.flip(0), ["open the drawer", "go"]).continuous, found)
    assert {
        tensor.dtype for tensor in load_file(shipped / "weights.safetensors").values() if tensor.is_floating_point()
    } == {torch.float16}


def test_only_the_artifact_is_shipped_with_its_card_and_sums(trained: dict[str, Path], tmp_path: Path) -> None:
    shipped = ship(trained["gidm"], tmp_path / "shipped", notes="Recorded in scenes A to C.")
    assert {file.name for file in shipped.iterdir()} == {
        "config.yaml",
        "meta.json",
        "weights.safetensors",
        "model_card.md",
        "SHA256SUMS",
    }
    read_meta = artifact.read_meta(shipped, "gidm")
    assert (read_meta["scale"], read_meta["step"], read_meta["stats"]["x"], read_meta["stats"]["shipped"]["from"]) == (
        "tiny",
        3,
        1,
        artifact.sha256(trained["gidm"]),
    )
    card = (shipped / "model_card.md").read_text()
    assert (
        "license: mit" in card
        and "| codes_used | 7 |" in card
        and "held out, step 3" in card
        and card.endswith("Recorded in scenes A to C.")
    )
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=shipped, check=True)
    with pytest.raises(FileExistsError, match="exists already"):
        ship(trained["gidm"], shipped)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("gidm", "weights.safetensors"),
        ("gidm", "config.yaml"),
        ("gfdm", "unet/diffusion_pytorch_model.safetensors"),
        ("gfdm", "vae/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_flipped_byte_is_refused_in_one_line(trained: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    file = ship(trained[kind], tmp_path / "shipped") / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    message = rf"^[^\n]*shipped: {name} is not what SHA256SUMS says was shipped; fetch the folder again$"
    with pytest.raises(ArtifactError, match=message):
        artifact.load(tmp_path / "shipped", kind)
    with pytest.raises(ArtifactError, match=message):
        artifact.load_weights(nn.Identity(), tmp_path / "shipped")


def test_a_new_training_in_a_shipped_folder_is_accepted(trained: dict[str, Path], tmp_path: Path) -> None:
    shipped = ship(trained["gidm"], tmp_path / "shipped")
    artifact.save(
        artifact.load(trained["gidm"], "gidm"), shipped, kind="gidm", config=artifact.read_config(shipped, "gidm")
    )
    artifact.load(shipped, "gidm")
    assert not (shipped / "model_card.md").exists()


def test_what_fp16_cannot_hold_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.tensor(1e6))
    model.register_buffer("steps", torch.tensor(70_000))
    folder = artifact.save(model, tmp_path / "a", kind="gidm", config={"_target_": "x"}, scale="tiny")
    state = load_file(ship(folder, tmp_path / "b") / "weights.safetensors")
    assert state["seen"] == 1e6 and state["steps"] == 70_000 and state["weight"].dtype == torch.float16


def test_weights_under_other_licences_are_not_shipped(tmp_path: Path) -> None:
    for number, scale in enumerate(("full", None)):
        folder = artifact.save(nn.Linear(1, 1), tmp_path / f"a{number}", kind="gidm", config={}, scale=scale)
        with pytest.raises(ValueError, match=f"its scale is {scale}; only models of scale=tiny or small are shipped"):
            ship(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
