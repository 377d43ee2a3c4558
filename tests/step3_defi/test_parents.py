"""Which forward and inverse models a policy may be built on, with the real models at scale tiny."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common import artifact
from step3_defi import policy
from tests.step3_defi.test_train import run


def relabel(folder: Path, **changes: str | None) -> None:
    """Change entries in the meta.json of an artifact."""
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**record, **changes}))


def test_a_policy_records_its_scale_and_carries_it_along(tree: Path, tmp_path: Path) -> None:
    folder = run(tree, "scaled")
    whole = policy.load(folder).save_pretrained(tmp_path / "whole")
    assert (
        artifact.read_meta(folder)["scale"]
        == artifact.read_meta(folder / policy.BEST)["scale"]
        == artifact.read_meta(whole)["scale"]
        == "tiny"
    )


@pytest.mark.parametrize("kind", policy.PARENTS)
def test_a_parent_of_another_scale_is_refused(tree: Path, kind: str) -> None:
    """A policy takes its sizes from its two models, so nothing else would stop it."""
    other = artifact.copy(tree / f"ckpts/{kind}/tiny", tree / f"ckpts/{kind}/{kind}_of_full")
    relabel(other, scale="full")
    with pytest.raises(
        SystemExit,
        match=rf"^error: [^\n]*{kind}_of_full: this {kind} has scale=full, but scale=tiny is needed; "
        r"move it away, or train one [^\n]*$",
    ):
        run(tree, "refused", f"policy.{kind}.path={other}")
    assert not (tree / "ckpts/defi/refused/meta.json").exists()


def refit(file: Path) -> None:
    """Write other weights to the same file."""
    save_file(
        {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    "part, weights, choice",
    [
        ("dinov2", "model.safetensors", ["defi/gidm=scratch", "policy.gidm.vision.path={}"]),
        ("svd", "unet/diffusion_pytorch_model.safetensors", ["defi/gfdm=vanilla_svd", "policy.gfdm.svd={}"]),
        ("clip", "model.safetensors", ["+policy.gfdm.overrides.clip={}"]),
    ],
)
def test_weights_that_were_fitted_again_are_not_read_from_the_cache(
    tree: Path, hub: Path, tmp_path: Path, part: str, weights: str, choice: list[str]
) -> None:
    """Path and config stay the same. In the last case only the text encoder of the forward model changes."""
    place, looks = shutil.copytree(hub / part, tmp_path / part), tmp_path / "looks"
    options = [f"cache_dir={looks}", "cache=true", "loop.max_steps=1", *(words.format(place) for words in choice)]
    run(tree, f"{part}_looks_at", *options)
    run(tree, f"{part}_looks_at_the_same", *options)
    assert len(list(looks.iterdir())) == 2, "training and validation, once"
    refit(place / weights)
    run(tree, f"{part}_looks_at_other_weights", *options)
    assert len(list(looks.iterdir())) == 4
