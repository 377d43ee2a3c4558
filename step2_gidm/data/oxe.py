"""Table 12 as one table: the 26 Open X-Embodiment sets that the inverse model is pretrained on (A.2).

Sources: UniVLA's mixture for weights and keys, LeRobot's openx configuration for control rates, OpenVLA's published
statistics for transition counts (Kuka and Bridge: implied by the paper's shares), the release's lists of names for
windows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

INSTRUCTION = "language_instruction"
OBSERVED = "observation/natural_language_instruction"


class OxeSet(NamedTuple):
    """One robot data set as the registry publishes it."""

    folders: tuple[str, ...]  # registry names, the first that exists on disk is read
    share: float  # per cent, Table 12
    weight: float  # UniVLA's factor on the number of transitions
    transitions: int
    hz: float  # control steps a second
    image: str = "observation/image"
    text: str = INSTRUCTION
    encoding: str = "text"  # of the sentence, common.rlds.ENCODINGS
    version: str | None = None  # None: the newest on disk
    window: tuple[int, int] = (10, 10)  # fewest and most frames that the release's pairs span, both included


SLOW, FAST = (3, 5), (15, 20)  # the release's lists of low and high frequency; toto is in both and counts as high


def _rlds(name: str) -> tuple[str, ...]:
    return (f"{name}_converted_externally_to_rlds", name)


OXE: dict[str, OxeSet] = {
    "fractal": OxeSet(("fractal20220817_data",), 16.3, 0.5, 3_786_400, 3, text=OBSERVED, window=SLOW),
    # unfiltered: OpenVLA's successes only (2,455,879) would have a share of 2.1
    "kuka": OxeSet(("kuka",), 7.4, 0.1, 8_590_000, 10, text=OBSERVED),
    # OXE's `bridge` 0.1.0; bridge_orig (2,135,463) would have a share of 18
    "bridge": OxeSet(("bridge", "bridge_oxe"), 8.0, 1.0, 928_000, 5, text=OBSERVED, version="0.1.0"),
    "taco_play": OxeSet(("taco_play",), 4.1, 2.0, 237_798, 15, "observation/rgb_static", OBSERVED),
    "jaco_play": OxeSet(("jaco_play",), 0.7, 1.0, 77_965, 10, text=OBSERVED),
    "berkeley_cable_routing": OxeSet(("berkeley_cable_routing",), 0.4, 1.0, 42_328, 10, text=OBSERVED),
    "roboturk": OxeSet(("roboturk",), 3.3, 2.0, 187_507, 10, "observation/front_rgb", OBSERVED),
    "viola": OxeSet(("viola",), 1.3, 2.0, 76_324, 20, "observation/agentview_rgb", OBSERVED, window=FAST),
    "berkeley_autolab_ur5": OxeSet(("berkeley_autolab_ur5",), 1.6, 2.0, 97_939, 5, text=OBSERVED, window=SLOW),
    "toto": OxeSet(("toto",), 2.8, 1.0, 325_699, 30, text=OBSERVED, window=FAST),
    "language_table": OxeSet(
        ("language_table",), 6.1, 0.1, 7_045_476, 10, "observation/rgb", "observation/instruction", "code_points"
    ),
    "stanford_hydra": OxeSet(_rlds("stanford_hydra_dataset"), 6.2, 2.0, 358_234, 10),
    "austin_buds": OxeSet(_rlds("austin_buds_dataset"), 0.4, 1.0, 34_112, 20),
    "nyu_franka_play": OxeSet(_rlds("nyu_franka_play_dataset"), 1.2, 3.0, 44_875, 3, window=SLOW),
    "furniture_bench": OxeSet(_rlds("furniture_bench_dataset"), 3.4, 0.1, 3_948_057, 10),
    "ucsd_kitchen": OxeSet(_rlds("ucsd_kitchen_dataset"), 0.1, 2.0, 3_970, 2, window=SLOW),
    "austin_sailor": OxeSet(_rlds("austin_sailor_dataset"), 3.0, 1.0, 353_094, 20, window=FAST),
    "austin_sirius": OxeSet(_rlds("austin_sirius_dataset"), 2.3, 1.0, 279_939, 20),
    "dlr_edan": OxeSet(_rlds("dlr_edan_shared_control"), 0.1, 1.0, 8_928, 5, window=SLOW),
    "iamlab_pickup_insert": OxeSet(_rlds("iamlab_cmu_pickup_insert"), 1.3, 1.0, 146_241, 20, window=FAST),
    "utaustin_mutex": OxeSet(("utaustin_mutex",), 3.0, 1.0, 361_883, 20, window=FAST),
    "berkeley_fanuc": OxeSet(("berkeley_fanuc_manipulation",), 1.1, 2.0, 62_613, 10),
    "cmu_stretch": OxeSet(("cmu_stretch",), 0.2, 1.0, 25_016, 10),
    "bc_z": OxeSet(
        ("bc_z",), 10.3, 0.2, 6_015_535, 10, text=OBSERVED, version="0.1.0"
    ),  # later versions are broken (OpenVLA)
    "fmb": OxeSet(("fmb", "fmb_dataset"), 9.8, 1.0, 1_137_459, 10, "observation/image_side_1"),
    "dobbe": OxeSet(("dobbe",), 2.0, 0.2, 1_139_911, 3.75, "observation/wrist_image", window=SLOW),
}
HUMAN_SHARE = 3.5  # Ego4D, Table 12; all shares sum to 99.9
HUMAN_TRANSITIONS = 406_000  # implied by that share
# that the release's Ego4D pairs span: a window of 2 of the 2 frames a second that it keeps; ours keep the clip's own
# rate
HUMAN_SECONDS = 0.5


def official_windows(seed: int = 42) -> dict[str, int]:
    """Frames that the release's pairs span, by robot set: it draws one number a set, once a run, and these are one such
    draw."""
    rng = np.random.default_rng(seed)
    return {name: int(rng.integers(*row.window, endpoint=True)) for name, row in OXE.items()}
