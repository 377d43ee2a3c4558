"""Every row of every table composes, changes only what it claims, and asks only for artifacts that some row makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class, get_object
from omegaconf import OmegaConf

from common import rows
from common.program import CONFIGS
from step3_defi.config import trainable_parts

STEP = {"gfdm": "step1_gfdm", "gidm": "step2_gidm", "defi": "step3_defi"}
ROWS = sorted(rows.load())
SCALES = ("tiny", "small", "full")
SHARES = (0, 20, 40, 60, 80)  # of the human videos, in percent (Fig. 8)

# how a step's samples are divided among GPUs and backward passes where the forward model learns
BATCHES = ("loop.batch_size", "loop.grad_accum_steps", "loop.eval_batches")
RELEASED = {"policy", "loop", "data.min_window", "data.future_frames", "data.load_future_frames", "data.views"}

CHANGES = {  # row -> the only subtrees that it may change, besides its name
    "gfdm/eq3_ddpm": {"gfdm.objective"},
    "gfdm/eq3_ddpm_v": {"gfdm.objective"},
    "gfdm/vpp": {"gfdm", "data", "loop"},
    "gfdm/t6_dino": {"gfdm", "data.image_size", "data.num_frames"},
    "gidm/official": {"gidm", "data", "loop"},
    "gfdm/t5_no_human": {"data.human_fraction"},
    "gidm/t5_no_human": {"data.human_fraction"},
    "gidm/t7_mlp": {"gidm"},
    "gidm/t7_transformer": {"gidm"},
    "gidm/t8_gaussian_mixture": {"gidm.quantizer"},
    "gidm/t8_binning": {"gidm.quantizer"},
    "gidm/t8_continuous": {"gidm.quantizer"},
    "defi/blind": {"policy.observation.blind"},
    "defi/no_alignment": {"policy.alignment", "data.load_future_frames"},
    "defi/a3_latent_only": {"policy.streams.names"},
    "defi/future_stream": {"policy.streams.names"},
    "defi/now": {"policy.streams.names"},
    "defi/joint": {
        "policy._target_",
        "policy.gfdm",
        "policy.gidm",
        "policy.trainable",
        "policy.video_weight",
        "policy.reconstruction_weight",
        "policy.bottleneck",
        "policy.alignment",
        "data.future_frames",
        "data.load_future_frames",
        *BATCHES,
    },
    "defi/official": RELEASED,
    "defi/vpp": RELEASED,
    "defi/t1_third_view": {"policy.observation.views", "data.views"},
    "defi/t4_gfdm_no_pretrain": {"policy.gfdm"},
    "defi/t4_gidm_no_pretrain": {"policy.gidm", "policy.bottleneck.codebook", "policy.bottleneck.restart_codes"},
    "defi/t5_all_no_human": {"policy.gfdm.path", "policy.gidm.path"},
    "defi/t5_gfdm_no_human": {"policy.gfdm.path"},
    "defi/t5_gidm_no_human": {"policy.gidm.path"},
    "defi/t6_dino": {"policy.gfdm.path"},
    "defi/t6_five_steps": {"policy.gfdm.overrides"},
    **{
        f"defi/{row}": {"policy.gidm.path"}
        for row in ("t7_mlp", "t7_transformer", "t8_gaussian_mixture", "t8_binning", "t8_continuous")
    },
    "defi/t9_adapter": {"policy.trainable"},
    **{f"defi/t9_{row}": {"policy.trainable", *BATCHES} for row in ("gfdm_adapter", "all")},
    **{f"defi/f4_data_{share}": {"data.fraction"} for share in (10, 20, 50)},
    **{f"{step}/f8_human_{share}": {"data.human_fraction"} for step in ("gfdm", "gidm") for share in SHARES},
    **{f"defi/f8_human_{share}": {"policy.gfdm.path", "policy.gidm.path"} for share in SHARES},
}


def resolved(step: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(version_base=None, config_dir=CONFIGS):
        return OmegaConf.to_container(compose(config_name=step, overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_has_one_picture_size_and_one_hub(scale: str) -> None:
    """Step 3 gives the forward model pictures of the size that step 1 trains on, and a scale below full needs only the
    weights that common.standins makes."""
    gfdm, gidm, defi = (resolved(step, f"scale={scale}") for step in ("step1_gfdm", "step2_gidm", "step3_defi"))
    assert gfdm["gfdm"]["image_size"] == defi["policy"]["observation"]["image_size"]
    if scale != "full":
        assert gfdm["data"]["latent_shape"][1] * 8 == gfdm["gfdm"]["image_size"] == gidm["gidm"]["vision"]["image_size"]
        places = [
            gfdm["gfdm"]["svd"],
            gfdm["gfdm"]["clip"],
            gidm["gidm"]["vision"]["path"],
            gidm["gidm"]["text"]["path"],
            defi["policy"]["goal"]["path"],
        ]
        assert all("/hub/tiny/" in place for place in places), places


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def targets(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield tree["_target_"]
        for sub in tree.values():
            yield from targets(sub)
    elif isinstance(tree, list):
        for sub in tree:
            yield from targets(sub)


@pytest.mark.parametrize("row", ROWS)
def test_row_composes_and_lands_under_its_own_name(row):
    cfg = resolved(STEP[row.split("/")[0]], f"experiment={row}")
    assert cfg["output_dir"] == f"ckpts/{row}"


@pytest.mark.parametrize("row", sorted(CHANGES))
def test_row_changes_only_what_it_claims(row):
    step = STEP[row.split("/")[0]]
    base, changed = flat(resolved(step)), flat(resolved(step, f"experiment={row}"))
    touched = {k for k in base.keys() | changed.keys() if base.get(k) != changed.get(k)} - {"name", "output_dir"}
    assert touched, "the row must change something"
    assert not {k for k in touched if not any(k == a or k.startswith(a + ".") for a in CHANGES[row])}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_says_whether_frozen_features_are_kept_on_the_disk(scale):
    """At full a window takes 42 MB, packed or not."""
    assert all(
        resolved("step3_defi", f"scale={scale}", f"data.pack={pack}")["cache"] is (scale != "full")
        for pack in ("true", "false")
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("defi/")])
def test_a_forward_model_learns_in_batches_as_small_as_step_1s(row):
    """On 80 GB; a step and a validation have as many samples as in the other rows, and below full nothing changes."""
    full = resolved("step3_defi", f"experiment={row}")
    if "gfdm" not in trainable_parts(full["policy"]["trainable"]):
        return
    loop, base = full["loop"], resolved("step3_defi")["loop"]
    assert loop["batch_size"] <= resolved("step1_gfdm")["loop"]["batch_size"]
    for count in ("grad_accum_steps", "eval_batches"):
        assert loop["batch_size"] * loop[count] == base["batch_size"] * base[count]
    for scale in ("tiny", "small"):
        assert (
            resolved("step3_defi", f"experiment={row}", f"scale={scale}")["loop"]
            == resolved("step3_defi", f"scale={scale}")["loop"]
        )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("choice", ["defi=official", "defi=vpp", "experiment=defi/official", "experiment=defi/vpp"])
def test_published_policies_compose_at_every_scale(choice, scale):
    cfg = resolved("step3_defi", choice, f"scale={scale}")
    policy = cfg["policy"]
    assert policy["adapter"]["_target_"] == "step3_defi.released.vpp_adapter.VPPAdapter"
    assert not policy["alignment"]["weight"] and not policy["streams"]["standardize"]
    assert policy["streams"]["names"] == (["video"] if "vpp" in choice else ["video", "latent"])
    assert policy["bottleneck"]["codebook"] == ("frozen" if "vpp" in choice else "learned")
    assert policy["edm"]["sample_sigma_min"] == 1.0 and policy["pairing"]["views"] == ["static"]
    assert policy["gfdm"]["overrides"] == {"fps": 4}
    assert policy["gidm"].get("overrides", {"clean_text": False}) == {"clean_text": False}
    row = choice.startswith("experiment")
    assert cfg["loop"]["optimizer"].get("betas") == ([0.9, 0.9] if row else None)
    assert cfg["data"]["min_window"] == (22 if row else None)
    for target in set(targets(cfg)):
        assert get_object(target)


@pytest.mark.parametrize(
    "scale, seconds", [("tiny", [1 / 3, 1.0]), ("small", [1 / 3, 1.0]), ("full", [1 / 3, 2 / 3, 1.0])]
)
def test_true_frames_lie_where_the_imagined_ones_do(scale, seconds):
    """Frame 15 of 16 at stride 2, or frame 3 of 4 at stride 10, is a second ahead at 30 Hz."""
    data = resolved("step3_defi", f"scale={scale}")["data"]
    assert [frame * data["future_stride"] / 30 for frame in data["future_frames"]] == pytest.approx(seconds)
    joint = resolved("step3_defi", "experiment=defi/joint", f"scale={scale}")
    assert (
        joint["policy"]["_target_"] == "step3_defi.joint.JointDeFI"
        and "path" not in joint["policy"]["gfdm"] | joint["policy"]["gidm"]
    )
    assert (joint["data"]["future_frames"] - 1) * joint["data"]["future_stride"] == 30
    for target in set(targets(joint)):
        assert get_object(target)


def test_every_row_says_what_it_changes():
    assert set(ROWS) == set(CHANGES)


def test_the_rows_change_what_the_text_of_the_file_says():
    """Of a row with a part for one scale only: the part counts at that scale, and comes after the rest of the row."""
    official = {scale: resolved("step2_gidm", "experiment=gidm/official", f"scale={scale}") for scale in SCALES}
    assert [official[scale]["gidm"]["encoder_layers"] for scale in SCALES] == [2, 3, 12]
    assert [official[scale]["loop"]["max_steps"] for scale in SCALES] == [400, 6000, 150000]
    assert all(config["loop"]["max_grad_norm"] == 0.1 and config["name"] == "official" for config in official.values())
    assert resolved("step2_gidm", "experiment=gidm/official", "gidm.encoder_layers=5")["gidm"]["encoder_layers"] == 5


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("defi/")])
def test_every_artifact_that_step_3_wants_is_made_by_some_row(row):
    cfg = resolved("step3_defi", f"experiment={row}")
    made = {f"ckpts/{r}" for r in ROWS} | {f"ckpts/{kind}/{scale}" for kind in ("gfdm", "gidm") for scale in SCALES}
    for kind in ("gfdm", "gidm"):
        path = cfg["policy"][kind].get("path")
        assert path is None or path in made, path


@pytest.mark.parametrize("step", STEP.values())
@pytest.mark.parametrize("scale", SCALES)
def test_scales_compose_and_every_target_exists(step, scale):
    for target in set(targets(resolved(step, f"scale={scale}"))):
        assert get_object(target) or get_class(target)


@pytest.mark.parametrize("step", STEP.values())
def test_the_share_of_damaged_draws_is_a_key(step):
    assert (
        resolved(step)["loop"]["max_unreadable_fraction"] == 0.05
        and resolved(step, "scale=full", "loop.max_unreadable_fraction=0.2")["loop"]["max_unreadable_fraction"] == 0.2
    )


@pytest.mark.parametrize(
    "data, root", [("defi_full", "task_ABC_D"), ("calvin_d", "task_D_D"), ("calvin_debug", "calvin_debug_dataset")]
)
def test_calvins_sets_have_one_reader(data, root):
    found, base = (resolved("step3_pack", "scale=full", f"data={name}")["data"] for name in (data, "defi_full"))
    assert found["_target_"] == "step3_defi.data.dataset.CalvinWindows" and found.keys() == base.keys()
    assert found["root"] == f"data/calvin/{root}"
    assert {key for key in base if base[key] != found[key]} <= {"root", "val_fraction", "val_folder"}


def test_no_file_only_names_another():
    """And no group is larger than needed: a row is an entry of rows.yaml, not a file."""
    for file in Path(CONFIGS).rglob("*.yaml"):
        config = OmegaConf.load(file)
        defaults = [entry for entry in config.get("defaults", []) if entry != "_self_"]
        alias = config.keys() == {"defaults"} and len(defaults) == 1 and isinstance(defaults[0], str)
        assert not alias, f"{file} only stands for {defaults}"
    assert len(list(Path(CONFIGS).rglob("*.yaml"))) <= 110


@pytest.mark.parametrize(
    "step, bad",
    [
        ("step2_gidm", "gidm=vaq"),
        ("step3_defi", "defi/gidm=everything"),
        ("step2_gidm", "loop.lr=1"),
        ("step1_gfdm", "experiment=gfdm/t10"),
        ("step1_gfdm", "colour=blue"),
    ],
)
def test_unknown_keys_and_values_fail(step, bad):
    with pytest.raises(HydraException):
        resolved(step, bad)
