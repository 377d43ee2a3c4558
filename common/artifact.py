"""How the steps hand each other models: a folder with weights, the config that builds them, and where they came from.

    weights.safetensors   own parameters and buffers (a model may own its files through save_weights / load_weights)
    config.yaml           the resolved subtree that builds the model; "${here}" stands for the folder itself
    meta.json             {"format": 1, "kind", "scale", "git", "step", "parents": {name: sha256}, "stats"}

    SHA256SUMS            of what was shipped (common.ship): then loading checks every file

"scale" is the tiny, small or full of the run that made it, or null where nobody can say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common import files, rows
from common.checkpoint import state_dict_mismatch

FORMAT = 1
KINDS = {"gfdm": "step1_gfdm", "gidm": "step2_gidm", "defi": "step3_defi"}
HERE = "${here}"
SUMS, MODEL_CARD = "SHA256SUMS", "model_card.md"
BESIDE = ("resume", "parents", "best")  # folders inside an artifact's that are no part of it


class ArtifactError(ValueError):
    """An artifact that is missing, of another kind, or does not fit its own config."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    kind: str,
    config: dict[str, Any],
    step: int = 0,
    scale: str | None = None,
    parents: dict[str, str] | None = None,
    stats: dict[str, Any] | None = None,
) -> Path:
    """Write an artifact beside its place, then rename its files into it. Other files of the folder stay."""
    if kind not in KINDS:
        raise ArtifactError(f"unknown kind {kind!r}; kinds: {sorted(KINDS)}")
    folder = Path(folder)
    tmp_dir = folder / f".artifact.{os.getpid()}"
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    try:
        if hasattr(model, "save_weights"):
            model.save_weights(tmp_dir)
        else:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
                tmp_dir / "weights.safetensors",
            )
        (tmp_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        record = {
            "format": FORMAT,
            "kind": kind,
            "scale": scale,
            "git": _git_commit(),
            "step": step,
            "parents": parents or {},
            "stats": stats or {},
        }
        (tmp_dir / "meta.json").write_text(json.dumps(record, indent=2) + "\n")
        for name in (SUMS, MODEL_CARD):  # they speak of what lay here before
            (folder / name).unlink(missing_ok=True)
        # meta.json moves last: a folder with it is whole
        for item in sorted(tmp_dir.iterdir(), key=lambda p: p.name == "meta.json"):
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return folder


def load(path: str | Path, kind: str, overrides: dict[str, Any] | None = None) -> nn.Module:
    """Build the model from its own config, load its weights with strict keys, and return it in eval mode."""
    check_sums(path)
    folder, config = Path(path), read_config(path, kind, overrides)
    try:
        model = instantiate(_place(config, folder))
    except InstantiationException as error:
        raise ArtifactError(f"{folder}: its config does not build: {error}") from error
    _fill(model, folder)
    return model.eval()


def read_config(path: str | Path, kind: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config that builds an artifact's model; `overrides` replace values at dotted keys that it has."""
    folder = Path(path)
    read_meta(folder, kind)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    _check_targets(config, folder)
    for key, value in (overrides or {}).items():
        node = config
        *parents, last = key.split(".")
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ArtifactError(f"{folder}: override {key!r} names no key of its config")
        node[last] = value
    return config


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load an artifact's weights into a built model, keys strict."""
    check_sums(folder)
    _fill(model, Path(folder))


def check_sums(path: str | Path) -> None:
    """Refuse an artifact whose files are not those that its SHA256SUMS names; one without has nothing to check."""
    folder = Path(path)
    lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).is_file() else []
    for sha, name in (line.split("  ", 1) for line in lines):
        if not (folder / name).is_file() or files.sha256(folder / name) != sha:
            raise ArtifactError(f"{folder}: {name} is not what {SUMS} says was shipped; fetch the folder again")


def _fill(model: nn.Module, folder: Path) -> None:
    if hasattr(model, "load_weights"):
        model.load_weights(folder)
        return
    file = folder / "weights.safetensors"
    if not file.is_file():
        raise ArtifactError(f"{folder}: weights.safetensors is missing")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"{file}: not readable ({error})") from error
    if wrong := state_dict_mismatch(model, state):
        raise ArtifactError(f"{file} does not fit its config: {wrong}")
    model.load_state_dict(state)


def copy(source: str | Path, folder: str | Path) -> Path:
    """A whole artifact elsewhere, without what its training left beside it: resume state, logs, parents. Written
    beside, then renamed."""
    source, folder = Path(source), Path(folder)
    read_meta(source)
    if source.resolve() != folder.resolve():
        tmp_dir = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            shutil.copytree(source, tmp_dir, ignore=shutil.ignore_patterns(*BESIDE, "hydra", "wandb", "*.log", ".*"))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(tmp_dir, folder)
        finally:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    return folder


def read_meta(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The folder's meta.json, checked for format and kind."""
    file = Path(path) / "meta.json"
    if not file.is_file():
        maker = {
            "gfdm": "scripts/step1_train_svd.sh",
            "gidm": "scripts/step2_train_gidm.sh",
            "defi": "scripts/step3_train_calvin.sh",
        }
        name = Path(path).name
        row = f"experiment={kind}/{name} " if f"{kind}/{name}" in rows.load() else ""
        hint = f"; make one with {maker[kind]} {row}name={name}" if kind in maker else ""
        raise ArtifactError(f"{path}: no artifact here (meta.json is missing){hint}")
    record = json.loads(file.read_text())
    if record.get("format") != FORMAT:
        raise ArtifactError(f"{path}: artifact format {record.get('format')}, this code reads {FORMAT}")
    if kind is not None and record.get("kind") != kind:
        raise ArtifactError(f"{path}: this is a {record.get('kind')!r} artifact, a {kind!r} artifact is needed")
    return record


def check_scale(path: str | Path, kind: str, scale: str) -> None:
    """Refuse an artifact that a run of another scale made: names do not hold the scale, and a policy builds itself to
    whatever parent it is given.

    An artifact whose scale is null (made elsewhere) fits every scale.
    """
    record = read_meta(path, kind)
    if "scale" not in record:
        raise ArtifactError(f"{path}: this {kind} was trained before scales were recorded; train it again")
    if record["scale"] not in (None, scale):
        elsewhere = f", and give it with policy.{kind}.path=" if kind != "defi" else ""
        raise ArtifactError(
            f"{path}: this {kind} is of scale={record['scale']}, one of scale={scale} is needed; "
            f"move it away, or train one with scale={scale} under another name={elsewhere}"
        )


def sha256(path: str | Path) -> str:
    """One hash over an artifact's weight files and config, names included: the identity that children record."""
    folder = Path(path)
    read_meta(folder)
    digest = hashlib.sha256()
    weights = [f for f in folder.rglob("*.safetensors") if not {*BESIDE} & {*f.relative_to(folder).parts}]
    for file in sorted(weights) + [folder / "config.yaml"]:
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_targets(config: Any, folder: Path) -> None:
    """A loaded config may only build classes of our rooms: it comes from outside."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if target is not None and str(target).split(".")[0] not in {"common", *KINDS.values()}:
            raise ArtifactError(f"{folder}: its config builds {target!r}, which is not a class of this project")
        for value in config.values():
            _check_targets(value, folder)
    elif isinstance(config, list):
        for value in config:
            _check_targets(value, folder)


def _place(config: Any, folder: Path) -> Any:
    if isinstance(config, dict):
        return {key: _place(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [_place(value, folder) for value in config]
    return str(folder) if config == HERE else config


def _git_commit() -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
