"""Copy a trained artifact to a new folder in half precision, small enough to be part of a repository.

Floating-point numbers become float16; loading converts them back to float32. Logs and resume states of the training are
not copied. The folder gets a model_card.md and SHA256SUMS, which `sha256sum -c` and artifact.load check.

Examples:
    python -m common.ship path=ckpts/gidm/tiny out=ckpts/shipped/gidm
    python -m common.ship path=ckpts/gfdm/tiny out=/tmp/gfdm notes=notes.md
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import artifact, files
from common.errors import OutputExistsError, UserError
from common.program import program

log = logging.getLogger(__name__)
WHAT = {"gfdm": "forward model (GFDM, step 1)", "gidm": "inverse model (GIDM, step 2)", "defi": "policy (DeFI, step 3)"}
OWN_SCALES = ("tiny", "small")  # all weights of models of these scales come from this repository
CARD = """---
license: mit
---
# {what}, scale={scale}

Trained for {step:,} steps at commit {git} of this repository. {count:,} weights, {size:.1f} MB; floating-point numbers
are stored as float16. Frozen encoders that are not part of the folder are loaded from where `config.yaml` names them.
Licence: MIT, as the repository.

    from common import artifact
    model = artifact.load("<this folder>", "{kind}")  # float32; checks SHA256SUMS
{measured}{notes}"""


def ship(path: str | Path, out: str | Path, *, notes: str = "") -> Path:
    """Write the artifact `path` in half precision to the new folder `out`; `notes` are appended to its model card.

    Raises UserError where its scale is not one of OWN_SCALES, because its weights may then be derived from published
    ones under another licence, and where `out` exists.
    """
    path, out = Path(path), Path(out)
    record = artifact.read_meta(path)
    if record.get("scale") not in OWN_SCALES:
        raise UserError(
            f"{path}: its scale is {record.get('scale')}; only models of scale={' or '.join(OWN_SCALES)} are shipped, "
            "since others may contain weights under other licences"
        )
    if out.exists():
        raise OutputExistsError(f"{out} exists already; name another folder with out=, or remove it")
    tmp_dir = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        count = 0
        for file in _files(path):
            target = tmp_dir / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                count += _halve(file, target)
            else:
                shutil.copy(file, target)
        stats = {**record["stats"], "shipped": {"from": artifact.sha256(path), "precision": "float16"}}
        (tmp_dir / "meta.json").write_text(json.dumps({**record, "stats": stats}, indent=2) + "\n")
        size = sum(file.stat().st_size for file in tmp_dir.rglob("*") if file.is_file()) / 1e6
        card = CARD.format(
            what=WHAT[record["kind"]][0].upper() + WHAT[record["kind"]][1:],
            count=count,
            size=size,
            measured=_measured(path),
            notes=notes and f"\n{notes}",
            **record,
        )
        (tmp_dir / artifact.MODEL_CARD).write_text(card)
        names = sorted(file.relative_to(tmp_dir).as_posix() for file in tmp_dir.rglob("*") if file.is_file())
        (tmp_dir / artifact.SUMS).write_text("".join(f"{files.sha256(tmp_dir / name)}  {name}\n" for name in names))
        os.replace(tmp_dir, out)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return out


def _files(folder: Path) -> Iterator[Path]:
    """The files of an artifact besides meta.json: config and weights, or the parts named in a pipeline's index."""
    index = folder / "model_index.json"
    for file in (folder / "config.yaml", folder / "weights.safetensors", index):
        if file.is_file():
            yield file
    for part in json.loads(index.read_text()) if index.is_file() else ():
        yield from (file for file in sorted((folder / part).rglob("*")) if file.is_file())


def _halve(source: Path, target: Path) -> int:
    """Write a safetensors file in half precision and return its number of weights."""
    with safe_open(source, framework="pt") as file:
        tensors = {key: _half(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (no mapping)
        save_file(tensors, target, metadata=file.metadata())
    return sum(tensor.numel() for tensor in tensors.values())


def _half(tensor: Tensor) -> Tensor:
    """A floating-point tensor in float16, unless a value does not fit, such as a running count of samples."""
    fits = tensor.is_floating_point() and bool((tensor.abs() <= torch.finfo(torch.float16).max).all())
    return tensor.half() if fits else tensor


def _measured(path: Path) -> str:
    """The last validation in metrics.jsonl, as a Markdown table; empty where there is none."""
    log_file = path / "metrics.jsonl"
    rows: list[dict[str, Any]] = (
        [json.loads(line) for line in log_file.read_text().splitlines()] if log_file.is_file() else []
    )
    held_out = next((row for row in reversed(rows) if any(key.startswith("val/") for key in row)), None)
    if held_out is None:
        return ""
    lines = [
        f"| {key.removeprefix('val/')} | {value:.4g} |"
        for key, value in sorted(held_out.items())
        if key.startswith("val/") and value is not None
    ]
    return "\n".join([f"\n| held out, step {held_out['step']:,} | |", "|---|---|", *lines, ""])


@program("ship")
def main(cfg: DictConfig) -> None:
    out = ship(cfg.path, cfg.out, notes=Path(cfg.notes).read_text() if cfg.notes else "")
    log.info("shipped to %s: %.1f MB", out, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6)


if __name__ == "__main__":
    main()
