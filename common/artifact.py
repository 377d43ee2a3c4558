"""How the steps pass models to each other: an artifact is a folder with weights, config and origin.

    weights.safetensors   parameters and buffers, unless the model has files of its own (contracts.OwnsWeightFiles)
    config.yaml           the resolved config that builds the model; "${here}" means the folder itself
    meta.json             {"format": 2, "kind", "scale", "git", "step", "parents": {name: sha256}, "stats"}
    SHA256SUMS            only of artifacts that were shipped (common.ship); loading then checks every file

"kind" names what the model is (each step has one), "scale" is the tiny, small or full of the run that trained it, or
null where that is not known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common import files, rows
from common.checkpoint import state_dict_mismatch
from common.contracts import OwnsWeightFiles
from common.errors import UserError

FORMAT = 2
PACKAGES = re.compile(r"(common|step\d+_\w+)\.[\w.]+")  # modules of this project whose classes a config may build
# The only functions that a config may call: they load an artifact or a frozen encoder.
LOADERS = ("common.artifact.load", "common.frozen.clip_text", "common.frozen.dinov2", "common.frozen.t5_text")
HERE = "${here}"
SUMS, MODEL_CARD = "SHA256SUMS", "model_card.md"
NO_PART = ("resume", "parents", "best")  # folders inside an artifact's folder that are no part of it
_made_by: dict[str, str] = {}  # kind -> the command that trains one


class ArtifactError(UserError):
    """An artifact is missing, is of another kind, or does not fit its own config."""


def register_kind(kind: str, *, made_by: str) -> None:
    """Each step tells which command trains its kind of artifact; the message about a missing one repeats it."""
    _made_by[kind] = made_by


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
    """Write an artifact into `folder` and return it. Other files of the folder stay.

    The files are written under another name and then renamed, so that a save that fails leaves the previous artifact.
    config: what `hydra.utils.instantiate` builds the model from. parents: name -> sha256 of the artifacts it was
    trained on. stats: anything else to remember, as JSON.
    """
    folder = Path(folder)
    tmp_dir = folder / f".artifact.{os.getpid()}"
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir(parents=True)
    try:
        if isinstance(model, OwnsWeightFiles):
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
        for name in (SUMS, MODEL_CARD):  # they describe the previous artifact
            (folder / name).unlink(missing_ok=True)
        # meta.json is renamed last: a folder that has it is complete
        for item in sorted(tmp_dir.iterdir(), key=lambda p: p.name == "meta.json"):
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return folder


def load(path: str | Path, kind: str, overrides: dict[str, Any] | None = None) -> nn.Module:
    """Build the model from its own config, load its weights with strict keys, and return it in eval mode.

    overrides: dotted key of the config -> value. Raises ArtifactError.
    """
    check_sums(path)
    folder, config = Path(path), read_config(path, kind, overrides)
    try:
        model = instantiate(_fill_in_folder(config, folder))
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise ArtifactError(f"{folder}: {error.__cause__}") from error
        if not isinstance(error.__cause__, (TypeError, ImportError, type(None))):
            raise  # a bug in the model's constructor
        raise ArtifactError(f"{folder}: its config does not build: {' '.join(str(error).split())}") from error
    _load_weights(model, folder)
    return model.eval()


def read_config(path: str | Path, kind: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config that builds the model of an artifact. `overrides` replace values at dotted keys that exist in it."""
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
    """Load the weights of an artifact into a model that is built already, with strict keys."""
    check_sums(folder)
    _load_weights(model, Path(folder))


def check_sums(path: str | Path) -> None:
    """Raise ArtifactError where a file differs from the SHA256SUMS of the artifact; without that file, do nothing."""
    folder = Path(path)
    lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).is_file() else []
    for sha, name in (line.split("  ", 1) for line in lines):
        if not (folder / name).is_file() or files.sha256(folder / name) != sha:
            raise ArtifactError(f"{folder}: {name} is not what {SUMS} says was shipped; fetch the folder again")


def _load_weights(model: nn.Module, folder: Path) -> None:
    if isinstance(model, OwnsWeightFiles):
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
    """Copy an artifact to another folder, without the resume state, the logs and the parents of its training.

    The copy is written under another name and then renamed.
    """
    source, folder = Path(source), Path(folder)
    read_meta(source)
    if source.resolve() != folder.resolve():
        tmp_dir = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            shutil.copytree(source, tmp_dir, ignore=shutil.ignore_patterns(*NO_PART, "hydra", "wandb", "*.log", ".*"))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(tmp_dir, folder)
        finally:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    return folder


def read_meta(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The folder's meta.json, checked for format and, if given, kind. Raises ArtifactError."""
    file = Path(path) / "meta.json"
    if not file.is_file():
        name = Path(path).name
        row = f"experiment={kind}/{name} " if f"{kind}/{name}" in rows.load() else ""
        hint = f"; make one with {_made_by[kind]} {row}name={name}" if kind in _made_by else ""
        raise ArtifactError(f"{path}: no artifact here (meta.json is missing){hint}")
    record = json.loads(file.read_text())
    if record.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: artifact of format {record.get('format')}, this version reads format {FORMAT} only; train it "
            "again, or fetch it again if it was downloaded"
        )
    if kind is not None and record.get("kind") != kind:
        raise ArtifactError(f"{path}: this is a {record.get('kind')!r} artifact, a {kind!r} artifact is needed")
    return record


def check_scale(path: str | Path, kind: str, scale: str) -> None:
    """Raise ArtifactError where a run of another scale trained an artifact. A scale of null fits every scale.

    Names do not contain the scale, and a policy adapts its own sizes to those of the models that it is given.
    """
    record = read_meta(path, kind)
    if record["scale"] not in (None, scale):
        raise ArtifactError(
            f"{path}: this {kind} has scale={record['scale']}, but scale={scale} is needed; move it away, or train one "
            f"with scale={scale} under another name= and give its path"
        )


def sha256(path: str | Path) -> str:
    """One hash over the weight files and the config of an artifact, names included: what children record of it."""
    folder = Path(path)
    read_meta(folder)
    digest = hashlib.sha256()
    weights = [f for f in folder.rglob("*.safetensors") if not {*NO_PART} & {*f.relative_to(folder).parts}]
    for file in sorted(weights) + [folder / "config.yaml"]:
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_targets(config: Any, folder: Path) -> None:
    """Raise ArtifactError where a config builds anything but a class of this project, since it could run code."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if target is not None and target not in LOADERS and not _is_own_class(str(target)):
            raise ArtifactError(f"{folder}: its config builds {target!r}, which is not a class of this project")
        for value in config.values():
            _check_targets(value, folder)
    elif isinstance(config, list):
        for value in config:
            _check_targets(value, folder)


def _is_own_class(target: str) -> bool:
    """Whether the object behind a name is a class that this project defines.

    The object is judged and not its name, because a name also reaches functions, and what a module of ours imports, as
    in step2_gidm.model.torch.load.
    """
    if not PACKAGES.fullmatch(target):
        return False
    try:
        found = get_object(target)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and bool(PACKAGES.fullmatch(f"{found.__module__}.{found.__name__}"))


def _fill_in_folder(config: Any, folder: Path) -> Any:
    if isinstance(config, dict):
        return {key: _fill_in_folder(value, folder) for key, value in config.items()}
    if isinstance(config, list):
        return [_fill_in_folder(value, folder) for value in config]
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
