"""DinoFuture: its contract, what it learns, and its row of Table 6."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from common import artifact
from common.frozen import clip_text, dinov2
from common.program import CONFIGS
from step1_gfdm import DinoFuture


@pytest.fixture(scope="module")
def parts(hub: Path) -> dict[str, nn.Module]:
    return {"vision": dinov2(hub / "dinov2", 32), "text": clip_text(hub / "clip")}


def make(parts: dict[str, nn.Module], **options: object) -> DinoFuture:
    torch.manual_seed(0)
    return DinoFuture(**parts, **{"num_frames": 3, "dim": 32, "layers": 2, "num_heads": 2, **options})


def sliding(count: int, *, seed: int) -> dict[str, object]:
    """Clips of a bright bar that moves in the direction of the sentence."""
    generator = torch.Generator().manual_seed(seed)
    frames, texts = torch.full((count, 3, 3, 32, 32), 0.2), []
    for i in range(count):
        right = bool(torch.rand((), generator=generator) < 0.5)
        texts.append("go right" if right else "go left")
        for frame in range(3):
            left = 12 + (8 if right else -8) * frame // 2
            frames[i, frame, :, :, left : left + 8] = 0.9
    return {"id": [str(i) for i in range(count)], "frames": frames, "text": texts}


def test_protocol(parts: dict[str, nn.Module]) -> None:
    model = make(parts)
    batch = sliding(4, seed=0)
    image = batch["frames"][:, 0] * 2 - 1
    imagined = model.eval().imagine(image, batch["text"])
    assert imagined.shape == (4, 3, model.num_tokens, model.feature_dim)
    now = parts["vision"](batch["frames"][:, 0])
    assert torch.allclose(imagined, now[:, None].expand_as(imagined), atol=1e-5), "it starts from no change"
    out = model.train()(batch)
    assert torch.allclose(out["mse"], out["copy_mse"], atol=1e-5)
    out["loss"].backward()
    assert not [
        name for name, p in model.named_parameters() if p.grad is None and not name.startswith(("vision", "text."))
    ]
    assert not [name for name in model.state_dict() if name.startswith(("vision", "text."))], (
        "frozen encoders are named, not copied"
    )
    with torch.no_grad():
        assert torch.equal(
            model.imagine(image[:1], batch["text"][:1], seed=1), model.imagine(image[:1], batch["text"][:1], seed=2)
        )
    with pytest.raises(ValueError, match="the clips have 2 frames, this model has 3"):
        model({**batch, "frames": batch["frames"][:, :2]})


def test_it_learns_where_the_sentence_sends_things(parts: dict[str, nn.Module]) -> None:
    model = make(parts)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        model(sliding(8, seed=step))["loss"].backward()
        optimizer.step()
    held_out = sliding(16, seed=1000)
    with torch.no_grad():
        right, wrong = (
            model.eval()({**held_out, "text": texts})
            for texts in (
                held_out["text"],
                ["go left" if text == "go right" else "go right" for text in held_out["text"]],
            )
        )
    assert right["mse"] < 0.5 * right["copy_mse"] < wrong["mse"]


def test_row_of_table_6_is_built_and_comes_back(hub: Path, tmp_path: Path) -> None:
    with initialize_config_dir(CONFIGS, version_base=None):
        cfg = compose("step1_gfdm", ["scale=tiny", "experiment=gfdm/t6_dino", f"paths.hub={hub.parent}/x"])
    config = OmegaConf.to_container(cfg.gfdm, resolve=True)
    config["vision"]["path"], config["text"]["path"] = str(hub / "dinov2"), str(hub / "clip")
    assert cfg.data.image_size == 64 and cfg.data.num_frames == 4
    model = instantiate(config).eval()
    nn.init.normal_(model.out.weight)
    artifact.save(model, tmp_path, kind="gfdm", config=config)
    loaded = artifact.load(tmp_path, "gfdm")
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.imagine(image, ["a", "b"]), loaded.imagine(image, ["a", "b"]))
