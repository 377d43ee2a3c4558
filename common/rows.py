"""The rows of the paper's tables and figures (configs/rows.yaml), which Hydra knows as `experiment=<step>/<row>`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

FILE = Path(__file__).resolve().parents[1] / "configs/rows.yaml"


def load() -> dict[str, dict[str, Any]]:
    """{"<step>/<row>": what the row changes}, where the step is gfdm, gidm or defi, in the order of the file."""
    table = OmegaConf.to_container(OmegaConf.load(FILE), resolve=False)
    return {f"{step}/{row}": changes for step, rows in table.items() for row, changes in rows.items()}


def register() -> None:
    """Give every row to Hydra's ConfigStore as the option <step>/<row> of the group `experiment`.

    What a row changes at one scale only (`at_scale`) becomes an option of a group inside it, which follows the scale.
    """
    store = ConfigStore.instance()
    for row, changes in load().items():
        step, name = row.split("/")
        at_scale = changes.pop("at_scale", {})
        overrides = changes.pop("defaults", [])  # Hydra wants overrides at the end of the list
        follow = [{f"optional /experiment/{row}@_global_": "${scale}"}] if at_scale else []
        node = {"defaults": ["_self_", *follow, *overrides], "name": name, **changes}
        store.store(group=f"experiment/{step}", name=name, node=node, package="_global_")
        for scale, more in at_scale.items():
            store.store(group=f"experiment/{step}/{name}", name=scale, node=more, package="_global_")


if __name__ == "__main__":  # python -m common.rows prints their names, for scripts
    sys.stdout.write("".join(f"{row}\n" for row in load()))
