"""What a policy may be built on, over the true tiny models."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import artifact
from step3_defi import policy
from tests.step3_defi.test_train import run


def relabel(folder: Path, **changes: str | None) -> None:
    """Change what an artifact's meta.json says."""
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**record, **changes}))


def test_a_policy_records_its_scale_and_carries_it_along(tree: Path, tmp_path: Path) -> None:
    folder = run(tree, "scaled")
    whole = policy.load(folder).save_pretrained(tmp_path / "whole")
    assert artifact.meta(folder)["scale"] == artifact.meta(folder / policy.BEST)["scale"] == artifact.meta(whole)["scale"] == "tiny"


@pytest.mark.parametrize("kind", policy.PARENTS)
def test_a_parent_of_another_scale_is_refused(tree: Path, kind: str) -> None:
    """A policy builds itself to whatever parent it is given, so nothing else would stop it."""
    other = artifact.copy(tree / f"ckpts/{kind}/tiny", tree / f"ckpts/{kind}/{kind}_of_full")
    relabel(other, scale="full")
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{kind}_of_full: this {kind} is of scale=full, one of scale=tiny is needed; "
                                         rf"move it away, or train one [^\n]*policy.{kind}.path=$"):
        run(tree, "refused", f"policy.{kind}.path={other}")
    assert not (tree / "ckpts/defi/refused/meta.json").exists()
