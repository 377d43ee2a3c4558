"""Table 12: the 26 Open X-Embodiment sets on which the inverse model is pretrained (A.2).

Sources: the paper for the shares, UniVLA's mixture for the keys, LeRobot's openx configuration for the control rates,
the release's lists of names for the windows. tests/step2_gidm/data/test_dataset.py derives the shares from published
numbers of transitions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

INSTRUCTION = "language_instruction"
OBSERVED = "observation/natural_language_instruction"


class OxeSet(NamedTuple):
    """One robot data set in the form in which the registry publishes it."""

    folders: tuple[str, ...]  # names in the registry; the first that exists on disk is read
    share: float  # per cent of the draws, Table 12
    hz: float  # control steps per second
    image: str = "observation/image"  # key of the camera image in a step
    text: str = INSTRUCTION  # key of the sentence in a step
    encoding: str = "text"  # of the sentence, one of common.rlds.ENCODINGS
    version: str | None = None  # None: the newest on disk
    window: tuple[int, int] = (10, 10)  # fewest and most frames that the release's pairs span, both included


SLOW, FAST = (3, 5), (15, 20)  # the release's lists of low and high frequency; toto is in both and counts as high


def _rlds(name: str) -> tuple[str, ...]:
    return (f"{name}_converted_externally_to_rlds", name)


OXE: dict[str, OxeSet] = {
    "fractal": OxeSet(("fractal20220817_data",), 16.3, 3, text=OBSERVED, window=SLOW),
    # All episodes: with OpenVLA's selection of successes (2,455,879 transitions) the share would be 2.1.
    "kuka": OxeSet(("kuka",), 7.4, 10, text=OBSERVED),
    # The `bridge` 0.1.0 of Open X-Embodiment: with bridge_orig (2,135,463 transitions) the share would be 18.
    "bridge": OxeSet(("bridge", "bridge_oxe"), 8.0, 5, text=OBSERVED, version="0.1.0"),
    "taco_play": OxeSet(("taco_play",), 4.1, 15, "observation/rgb_static", OBSERVED),
    "jaco_play": OxeSet(("jaco_play",), 0.7, 10, text=OBSERVED),
    "berkeley_cable_routing": OxeSet(("berkeley_cable_routing",), 0.4, 10, text=OBSERVED),
    "roboturk": OxeSet(("roboturk",), 3.3, 10, "observation/front_rgb", OBSERVED),
    "viola": OxeSet(("viola",), 1.3, 20, "observation/agentview_rgb", OBSERVED, window=FAST),
    "berkeley_autolab_ur5": OxeSet(("berkeley_autolab_ur5",), 1.6, 5, text=OBSERVED, window=SLOW),
    "toto": OxeSet(("toto",), 2.8, 30, text=OBSERVED, window=FAST),
    "language_table": OxeSet(("language_table",), 6.1, 10, "observation/rgb", "observation/instruction", "code_points"),
    "stanford_hydra": OxeSet(_rlds("stanford_hydra_dataset"), 6.2, 10),
    "austin_buds": OxeSet(_rlds("austin_buds_dataset"), 0.4, 20),
    "nyu_franka_play": OxeSet(_rlds("nyu_franka_play_dataset"), 1.2, 3, window=SLOW),
    "furniture_bench": OxeSet(_rlds("furniture_bench_dataset"), 3.4, 10),
    "ucsd_kitchen": OxeSet(_rlds("ucsd_kitchen_dataset"), 0.1, 2, window=SLOW),
    "austin_sailor": OxeSet(_rlds("austin_sailor_dataset"), 3.0, 20, window=FAST),
    "austin_sirius": OxeSet(_rlds("austin_sirius_dataset"), 2.3, 20),
    "dlr_edan": OxeSet(_rlds("dlr_edan_shared_control"), 0.1, 5, window=SLOW),
    "iamlab_pickup_insert": OxeSet(_rlds("iamlab_cmu_pickup_insert"), 1.3, 20, window=FAST),
    "utaustin_mutex": OxeSet(("utaustin_mutex",), 3.0, 20, window=FAST),
    "berkeley_fanuc": OxeSet(("berkeley_fanuc_manipulation",), 1.1, 10),
    "cmu_stretch": OxeSet(("cmu_stretch",), 0.2, 10),
    "bc_z": OxeSet(("bc_z",), 10.3, 10, text=OBSERVED, version="0.1.0"),  # later versions are broken (OpenVLA)
    "fmb": OxeSet(("fmb", "fmb_dataset"), 9.8, 10, "observation/image_side_1"),
    "dobbe": OxeSet(("dobbe",), 2.0, 3.75, "observation/wrist_image", window=SLOW),
}
HUMAN_SHARE = 3.5  # Ego4D, Table 12; all shares sum to 99.9
# The release keeps two frames per second of Ego4D and its pairs span a window of two frames. Ours keep every frame.
HUMAN_SECONDS = 0.5


def official_windows(seed: int = 42) -> dict[str, int]:
    """The number of frames that the release's pairs span, by robot set.

    The release draws one number for each set, once in a run; these are one such draw.
    """
    rng = np.random.default_rng(seed)
    return {name: int(rng.integers(*row.window, endpoint=True)) for name, row in OXE.items()}
