"""Artifacts: bit-exact round trip, strict keys, kinds, nothing foreign built, nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import artifact
from common.artifact import ArtifactError

CONFIG = {"_target_": "common.attention.Mlp", "dim": 4, "ratio": 2}


@pytest.fixture
def folder(tmp_path):
    from common.attention import Mlp

    return artifact.save(
        Mlp(4, 2), tmp_path / "a", kind="gidm", config=CONFIG, step=3, parents={"gfdm": "ab"}, stats={"x": 1}
    )


def test_round_trip_is_bit_exact_and_remembers_where_it_came_from(folder, tmp_path):
    model = artifact.load(folder, "gidm")
    assert not model.training
    again = artifact.save(model, tmp_path / "b", kind="gidm", config=CONFIG)
    one, two = load_file(folder / "weights.safetensors"), load_file(again / "weights.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one) and one.keys() == two.keys()
    read_meta = artifact.read_meta(folder, "gidm")
    assert (read_meta["step"], read_meta["parents"], read_meta["stats"], read_meta["format"]) == (
        3,
        {"gfdm": "ab"},
        {"x": 1},
        1,
    )
    assert artifact.sha256(folder) == artifact.sha256(again)
    assert not list(folder.glob(".artifact*"))


def test_wrong_kind_missing_folder_and_foreign_keys_are_one_clear_line(folder, tmp_path):
    with pytest.raises(ArtifactError, match="'gidm' artifact, a 'gfdm' artifact is needed"):
        artifact.load(folder, "gfdm")
    with pytest.raises(ArtifactError, match=r"no artifact here.*step2_train_gidm.sh name=nothing"):
        artifact.load(tmp_path / "nothing", "gidm")
    with pytest.raises(
        ArtifactError, match=r"step1_train_svd.sh experiment=gfdm/t5_no_human name=t5_no_human$"
    ):  # a row by its own recipe
        artifact.read_meta(tmp_path / "t5_no_human", "gfdm")
    state = load_file(folder / "weights.safetensors")
    state["stranger"] = state.pop("fc1.bias")
    save_file(state, folder / "weights.safetensors")
    with pytest.raises(ArtifactError, match="1 missing: fc1.bias; 1 unexpected: stranger"):
        artifact.load(folder, "gidm")
    (folder / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="not readable"):
        artifact.load(folder, "gidm")


def test_config_from_outside_builds_only_our_classes(folder):
    (folder / "config.yaml").write_text("_target_: os.system\ncommand: 'true'\n")
    with pytest.raises(ArtifactError, match="not a class of this project"):
        artifact.load(folder, "gidm")


def test_overrides_must_name_a_key(folder):
    with pytest.raises(ArtifactError, match="'depth' names no key"):
        artifact.load(folder, "gidm", {"depth": 2})


def test_failed_save_leaves_the_former_artifact(folder):
    class Broken(torch.nn.Linear):
        def save_weights(self, folder):
            (folder / "weights.safetensors").write_bytes(b"half")
            raise OSError("disk full")

    before = artifact.sha256(folder)
    with pytest.raises(OSError, match="disk full"):
        artifact.save(Broken(1, 1), folder, kind="gidm", config=CONFIG)
    assert artifact.sha256(folder) == before and json.loads((folder / "meta.json").read_text())["step"] == 3


def test_a_scale_is_remembered_and_another_one_refused(folder, tmp_path):
    from common.attention import Mlp

    place = artifact.save(Mlp(4, 2), tmp_path / "tiny", kind="gidm", config=CONFIG, scale="tiny")
    assert (
        artifact.read_meta(place)["scale"]
        == artifact.read_meta(artifact.copy(place, tmp_path / "copy"))["scale"]
        == "tiny"
    )
    artifact.check_scale(place, "gidm", "tiny")
    with pytest.raises(
        ArtifactError, match="^[^\n]*tiny: this gidm is of scale=tiny, one of scale=full is needed; move it away[^\n]*$"
    ):
        artifact.check_scale(place, "gidm", "full")
    assert artifact.read_meta(folder)["scale"] is None
    artifact.check_scale(folder, "gidm", "full")  # made elsewhere: nobody can say
    record = json.loads((place / "meta.json").read_text())
    del record["scale"]
    (place / "meta.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="trained before scales were recorded; train it again"):
        artifact.check_scale(place, "gidm", "tiny")
