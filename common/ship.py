"""Program: a trained artifact -> the same, small enough to come with a repository.   python -m common.ship
path=ckpts/gidm/tiny out=<folder>

Floating-point numbers become float16 (loading brings them back to float32), what the training left beside the artifact
stays behind, and
model_card.md and SHA256SUMS come with it. `sha256sum -c SHA256SUMS` checks it, as artifact.load does.
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
from common.program import program

log = logging.getLogger(__name__)
WHAT = {"gfdm": "forward model (GFDM, step 1)", "gidm": "inverse model (GIDM, step 2)", "defi": "policy (DeFI, step 3)"}
OWN = ("tiny", "small")  # scales whose every weight comes from this repository
CARD = """---
license: mit
---
# {what}, scale={scale}

Trained for {step:,} steps by commit {git} of this repository; {count:,} numbers, {size:.1f} MB, in float16 where they are floating point.
Frozen encoders that are not inside stay where `config.yaml` names them. Licence: MIT, as the repository.

    from common import artifact
    model = artifact.load("<this folder>", "{kind}")  # float32; checks SHA256SUMS
{measured}{notes}"""


def ship(path: str | Path, out: str | Path, *, notes: str = "") -> Path:
    """Write the artifact `path` in half precision to the new folder `out`; `notes` end its model card.

    ValueError: its scale is not one of OWN, so that its weights may stem from others, whose licence this is not.
    """
    path, out = Path(path), Path(out)
    record = artifact.read_meta(path)
    if record.get("scale") not in OWN:
        raise ValueError(
            f"{path}: its scale is {record.get('scale')}; only models of scale={' or '.join(OWN)} are shipped, since "
            "those of others "
            "may hold weights under other licences"
        )
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder with out=, or remove it")
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
            what=WHAT[record["kind"]].capitalize(),
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
    """What an artifact is made of besides meta.json: its config and weights, or the parts that a diffusers pipeline's
    index names."""
    index = folder / "model_index.json"
    for file in (folder / "config.yaml", folder / "weights.safetensors", index):
        if file.is_file():
            yield file
    for part in json.loads(index.read_text()) if index.is_file() else ():
        yield from (file for file in sorted((folder / part).rglob("*")) if file.is_file())


def _halve(source: Path, target: Path) -> int:
    """Write a safetensors file in half precision; returns how many numbers it holds."""
    with safe_open(source, framework="pt") as file:
        tensors = {key: _half(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (no mapping)
        save_file(tensors, target, metadata=file.metadata())
    return sum(tensor.numel() for tensor in tensors.values())


def _half(tensor: Tensor) -> Tensor:
    """In float16, where it is floating point and fits; a count of samples may not."""
    fits = tensor.is_floating_point() and bool((tensor.abs() <= torch.finfo(torch.float16).max).all())
    return tensor.half() if fits else tensor


def _measured(path: Path) -> str:
    """The last validation that the training wrote down, as a table."""
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
