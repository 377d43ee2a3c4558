"""Published policies: imported weights give the actions of the written-out formulas, and the rest is counted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import artifact
from step3_defi import policy, train
from step3_defi.edm import seeded_noise
from step3_defi.model import EncodedObservation
from step3_defi.released import import_weights
from step3_defi.released.names import IGNORED_PREFIXES, from_release
from tests.step3_defi.parts import configure
from tests.step3_defi.released.reference_policy import ReferenceModel, random_policy

HEADS = (2, 2, 2)
TEXTS = ["Open the drawer!", "push the red block to the left", "go"]
BUILT = [
    "policy.video_former.embed_hidden_dim=64",
    "policy.video_former.depth=2",
    "policy.adapter.encoder_layers=2",
    "policy.adapter.decoder_layers=2",
    "policy.observation.precision=fp32",
    "lam.vision.image_size=64",
    "lam.dim=64",
    "lam.num_heads=2",
    "lam.encoder_layers=2",
    "lam.decoder_layers=2",
    "lam.quantizer.codes=8",
    "lam.quantizer.dim=16",
]


def weights(tree: Path, *, inverse: bool = True) -> dict[str, Tensor]:
    gfdm = artifact.load(tree / "ckpts/gfdm/tiny", "gfdm")
    return random_policy(
        features=gfdm.feature_dim,
        frames=gfdm.num_frames,
        queries=4,
        dim=32,
        former_inner=32,
        width=64,
        visual=64,
        goal=64,
        layers=2,
        inverse=inverse,
    )


@pytest.fixture
def run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def run(file: Path, name: str, *overrides: str) -> Path:
        hub = tree / "ckpts/hub/tiny"
        where = [
            f"paths.ckpts={tree}/ckpts",
            f"lam.vision.path={hub}/dinov2",
            f"lam.text.path={hub}/t5",
            f"hydra.run.dir={tmp_path}/log",
        ]
        given = [
            "scale=tiny",
            f"path={file}",
            f"parents.gfdm={tree}/ckpts/gfdm/tiny",
            f"name={name}",
            *where,
            *BUILT,
            *overrides,
        ]
        monkeypatch.setattr(sys, "argv", ["import_weights", *given])
        import_weights.main()
        return tree / "ckpts/defi" / name

    return run


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Save tensors as the release does, whose file also holds an object of another class."""
    torch.save({"model": tensors, "args": argparse.Namespace(batch_size=20)}, path)
    return path


@pytest.mark.parametrize("preset", ["official", "vpp"])
@torch.no_grad()
def test_an_imported_policy_acts_as_the_formulas_say(
    preset: str, tree: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    if preset == "vpp":
        # Ten steps through random weights amplify rounding to 1e-3 for a few pictures, but for none of this seed.
        torch.manual_seed(1)
    tensors = weights(tree, inverse=preset == "official")
    folder = run(saved(tmp_path / "0012345.pt", tensors), f"acts_{preset}", f"defi={preset}", "foreign=skip")
    model, written = policy.load(folder).model, ReferenceModel(tensors, HEADS)
    views = {name: torch.rand(3, 3, 64, 64) * 2 - 1 for name in ("static", "gripper")}
    features = model.precompute(views, TEXTS)["features"].float()
    encoded = EncodedObservation(features)  # rounded to fp16, as both see them
    model.encode_observation = lambda *_, **__: encoded
    before_codes = []
    if preset == "official":
        model.gidm.to_latent.register_forward_hook(lambda _, args, out: before_codes.extend(out))
    actions = model.sample(views, TEXTS, seed=[3, 4, 5])
    for i, text in enumerate(TEXTS):  # three sentences in one batch, with their capitals and punctuation
        words = model.gidm.text([text])[0][0] if preset == "official" else None
        expected = written.sample(
            features[i], model.goal.pooled([text])[0], words, seeded_noise([3 + i], (10, 7))[0], future=1
        )
        torch.testing.assert_close(actions[i], expected, atol=1e-4, rtol=1e-4)
        if (
            preset == "official"
        ):  # before the codes, because a code would hide a small error in frames, view or sentence
            torch.testing.assert_close(
                before_codes[i], written.infer(features[i, 0, 0], features[i, 0, 1], words)[0], atol=1e-4, rtol=1e-4
            )
    assert actions.std(0).mean() > 1e-3, "the three must differ for this to say anything"


@pytest.mark.parametrize("preset", ["official", "vpp"])
def test_finetuning_goes_on_from_an_imported_policy(
    preset: str, tree: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    start = run(
        saved(tmp_path / "policy.pt", weights(tree, inverse=preset == "official")),
        f"from_{preset}",
        f"defi={preset}",
        "foreign=skip",
    )
    cfg = configure(
        "step3_defi",
        f"paths.ckpts={tree}/ckpts",
        f"paths.data={tree}/data",
        f"data.root={tree}/data/demonstrations",
        "data.val_fraction=0.25",
        f"defi={preset}",
        f"init_from={start}",
        f"name=on_{preset}",
        "data.frame_stride=8",
        "loop.max_steps=1",
        "loop.batch_size=2",
        "loop.eval_every=1",
        "loop.warmup_steps=0",
        "loop.optimizer.lr=1e-5",
        "loop.ema_decay=null",
        *(key for key in BUILT if key.startswith("policy.")),
    )
    train.main.__wrapped__(cfg)
    folder = tree / "ckpts/defi" / f"on_{preset}"
    before, after = (load_file(place / "weights.safetensors") for place in (start, folder))
    far = {
        key: float((after[key] - before[key]).abs().max())
        for key in after
        if key.startswith(("adapter", "video_former"))
    }
    assert 0 < max(far.values()) < 1e-4  # one step away from the imported weights
    record = artifact.read_meta(folder, "defi")
    assert (
        record["stats"]["init_from"] == artifact.sha256(start)
        and record["parents"] == artifact.read_meta(start)["parents"]
    )
    assert policy.load(folder).model.sample(
        {name: torch.zeros(1, 3, 64, 64) for name in ("static", "gripper")}, ["go"]
    ).shape == (1, 10, 7)


def test_what_is_left_out_is_named_and_counted(
    tree: Path, run: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = weights(tree)
    folder = run(saved(tmp_path / "last.pt", tensors), "left", "foreign=skip")
    record = artifact.read_meta(folder, "defi")
    unused = record["stats"]["imported"]["unused"]
    assert unused == {
        "language_goal.": 1,
        "TVP_encoder.": 5,
        "lam.text_encoder.": 12,
        "model.inner_model.pos_emb": 3 * 64,
        "model.inner_model.goal_emb.": 2 * 64 * 65 + 64 * 129,
        "model.inner_model.proprio_emb.": 2 * 64 * 9 + 64 * 129,
    }
    assert (
        record["parents"] == {"gfdm": artifact.sha256(tree / "ckpts/gfdm/tiny")}
        and record["stats"]["imported"]["file"] == "last.pt"
    )
    model = policy.load(folder).model
    counts = model.gidm.quantizer.counts.numel()  # only our models have this buffer
    assert sum(p.numel() for p in model.state_dict().values()) - counts + sum(unused.values()) == sum(
        t.numel() for t in tensors.values()
    )


def test_an_svd_folder_serves_as_forward_model(tree: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    save_file(weights(tree), tmp_path / "policy.safetensors")
    hub = tree / "ckpts/hub/tiny"
    folder = run(
        tmp_path / "policy.safetensors",
        "svd",
        f"parents.gfdm={hub}/svd",
        f"svd.clip={hub}/clip",
        "svd.image_size=64",
        "svd.num_frames=4",
        "svd.up_block_indices=[0,1,2]",
    )
    model = policy.load(folder).model
    assert artifact.read_meta(folder)["scale"] == "tiny"  # as given; published weights have scale=full
    assert artifact.read_meta(folder)["parents"] == {} and model.gfdm.module._time_ids.tolist() == [[4.0, 127.0, 0.0]]
    assert not model.gidm.clean_text and model.edm.get_sigmas()[-2] == 1.0


def test_what_does_not_fit_is_one_line_and_leaves_nothing(tree: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    tensors = weights(tree)
    vpp = {name: tensor for name, tensor in tensors.items() if not name.startswith(("lam.", "goal_emb.", "time_pos"))}
    cases = {
        "missing": (
            {k: v for k, v in tensors.items() if k != "Video_Former.layers.1.1.qkv.bias"},
            "3 missing: video_former.layers.1.temporal.to_k.bias",
        ),
        "stranger": (
            {**tensors, "model.inner_model.decoder.blocks.0.rotary": torch.ones(1)},
            "1 unexpected: adapter.decoder.0.rotary$",
        ),
        "shape": (
            {**tensors, "time_pos_emb": torch.ones(3, 1, 64)},
            r"1 of another shape: projector.time_pos_embed \(3, 1, 64\) for \(2, 1, 64\)$",
        ),
        "vpp": (vpp, r"holds no inverse model \(lam.\*\), so it is VPP's; use defi=vpp$"),
        "other": ({"unet.x": torch.ones(1)}, "no policy of the release or of VPP: .* start with unet$"),
    }
    for name, (content, message) in cases.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
            run(saved(tmp_path / f"{name}.pt", content), "misfit", "foreign=skip")
        assert "\n" not in str(caught.value)
    refused = (
        ("shape.pt", ["foreign=refuse"], "holds objects of argparse.Namespace .* foreign=skip"),
        ("shape.pt", ["foreign=run"], "refuse or skip"),
        ("nowhere.pt", [], "no such file"),
        ("other.pt", ["defi=vpp", "parents.gidm=x"], "no inverse model; leave parents.gidm out"),
    )
    for file, extra, message in refused:
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / file, "misfit", *extra)
    with pytest.raises(
        SystemExit, match=r"holds an inverse model \(lam.\*\), so it is a policy of the release; use defi=official$"
    ):
        run(saved(tmp_path / "x.pt", tensors), "misfit", "defi=vpp", "foreign=skip")
    assert not (tree / "ckpts/defi/misfit").exists()


def test_every_number_of_a_file_is_taken_or_counted() -> None:
    """Every number of a file is translated to our names, or counted under one of IGNORED_PREFIXES."""
    tensors = random_policy(features=6, frames=4, queries=2, dim=8, former_inner=8, width=8, visual=8, goal=5, layers=3)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    release = from_release(tensors)
    assert (
        all(torch.equal(tensors[name], before[name]) for name in before)
        and set(release.unused) <= set(IGNORED_PREFIXES)
        and release.has_gidm
    )
    taken = sum(tensor.numel() for name, tensor in release.state.items() if name != "gidm.quantizer.counts")
    assert taken + sum(release.unused.values()) == sum(tensor.numel() for tensor in tensors.values())
    assert not [
        name for name in release.state if name.split(".")[0] not in ("gidm", "projector", "video_former", "adapter")
    ]
