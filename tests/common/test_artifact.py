"""Artifacts have bit-exact round trips, strict keys and kinds; no foreign class is built, nothing is half-written."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hydra.errors import InstantiationException
from safetensors.torch import load_file, save_file

import step1_gfdm  # noqa: F401 (registers the command that trains a gfdm)
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
        artifact.FORMAT,
    )
    assert artifact.sha256(folder) == artifact.sha256(again)
    assert not list(folder.glob(".artifact*"))


def test_wrong_kind_missing_folder_and_foreign_keys_are_one_clear_line(folder, tmp_path):
    with pytest.raises(ArtifactError, match="'gidm' artifact, a 'gfdm' artifact is needed"):
        artifact.load(folder, "gfdm")
    with pytest.raises(ArtifactError, match=r"no artifact here.*step1_train_svd.sh name=nothing"):
        artifact.load(tmp_path / "nothing", "gfdm")
    with pytest.raises(
        ArtifactError, match=r"step1_train_svd.sh experiment=gfdm/t5_no_human name=t5_no_human$"
    ):  # a row of the paper is trained with its own config
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


def test_failed_save_leaves_the_previous_artifact(folder):
    class Broken(torch.nn.Linear):
        def save_weights(self, folder):
            (folder / "weights.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        def load_weights(self, folder):
            raise NotImplementedError

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
        ArtifactError, match="^[^\n]*tiny: this gidm has scale=tiny, but scale=full is needed; move it away[^\n]*$"
    ):
        artifact.check_scale(place, "gidm", "full")
    assert artifact.read_meta(folder)["scale"] is None
    artifact.check_scale(folder, "gidm", "full")  # its scale is not known


def test_an_artifact_of_an_older_format_is_refused_in_one_line(folder):
    record = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(record | {"format": artifact.FORMAT - 1}))
    message = r"^[^\n]*/a: artifact of format 1, this version reads format 2 only; train it again[^\n]*$"
    for read in (artifact.read_meta, artifact.sha256, lambda path: artifact.load(path, "gidm")):
        with pytest.raises(ArtifactError, match=message):
            read(folder)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "stepwise.Model", "step1.Model", "commons.Model", "xcommon.Model"),
        # what modules of ours import, our own functions, and a name that is completed later
        *("step2_gidm.model.torch.load", "common.metrics.np.load", "common.artifact.Path"),
        *("common.files.write_text", "common.artifact.copy", "common.${name}", "common.nothing.Here"),
    ],
)
def test_packages_of_others_are_never_built(folder, target):
    (folder / "config.yaml").write_text(f"a: [{{_target_: '{target}'}}]\n")
    with pytest.raises(ArtifactError, match=f"builds '{re.escape(target)}', which is not a class of this project"):
        artifact.read_config(folder, "gidm")


def test_a_bug_in_a_constructor_is_no_bad_config(folder):
    (folder / "config.yaml").write_text("_target_: common.attention.Mlp\ndim: -1\n")
    with pytest.raises(InstantiationException):
        artifact.load(folder, "gidm")
