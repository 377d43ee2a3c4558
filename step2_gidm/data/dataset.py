"""Pretraining data of the inverse model: sets of transitions, drawn by weight (Sec. 3.2, A.2, Table 12, Fig. 8)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common import human_video, rlds
from common.errors import UserError
from common.mixture import Mixture
from step2_gidm.data.oxe import HUMAN_SECONDS, HUMAN_SHARE, OXE, official_windows
from step2_gidm.data.pairs import Transitions
from step2_gidm.data.stream import StreamingMixture
from step2_gidm.data.transitions import CalvinTransitions, RldsTransitions, VideoTransitions

FORMATS: dict[str, type[Transitions]] = {
    "video": VideoTransitions,
    "rlds": RldsTransitions,
    "calvin": CalvinTransitions,
}

log = logging.getLogger(__name__)


def build_mixture(
    sets: Mapping[str, Mapping[str, Any]],
    *,
    split: str = "train",
    human_fraction: float = 1.0,
    length: int | None = None,
    augment: bool = False,
    stream: Mapping[str, Any] | None = None,
    **options: Any,
) -> Mixture | StreamingMixture:
    """Build sets of transitions that are drawn by weight.

    Args:
        sets: name -> options of a set. One option names the format and the folder: video=, rlds= or calvin=<folder>.
            `weight` is the weight of the set, by default its number of episodes. `human` marks human video. All other
            options are those of the format's class.
        split: "train" or "val".
        human_fraction: the fraction of the videos of human sets, and of their weight, that is kept (Fig. 8,
            common.human_video). With 0 and a given `length`, the human sets need not be on disk.
        length: number of draws in an epoch. By default it is the number of episodes, including all human video.
        augment: whether training augments its frames. Validation never does.
        stream: options of StreamingMixture, with which training reads. Without them, and in validation, pairs are read
            by random access.
        options: those of Transitions, for all sets.

    Raises UserError where a set has no format, or where a training set has no episodes.
    """
    kept_fractions = human_video.kept_fractions(sets, human_fraction)
    options = {**options, "augment": augment and split == "train"}
    members: dict[str, Transitions] = {}
    weights: dict[str, float] = {}
    unfiltered_length = 0
    for name, row in sets.items():
        row, kept = dict(row), kept_fractions[name]
        weight = row.pop("weight", None)
        row.pop("human", None)
        if weight == 0 or (kept == 0 and length is not None):
            continue
        formats = FORMATS.keys() & row.keys()
        if len(formats) != 1:
            raise UserError(
                f"set {name!r} needs one of {', '.join(f'{each}=<folder>' for each in FORMATS)}, got {sorted(row)}"
            )
        format = formats.pop()
        folder = row.pop(format)
        if format == "video":
            row["fraction"] = kept
        elif 0 < kept < 1:
            raise UserError(
                f"set {name!r}: human_fraction={human_fraction} can keep a part of a video set, but not of {format}"
            )
        with human_video.explain_missing_set(name, kept):
            transitions = FORMATS[format](folder, split, **options | row)
        unfiltered_length += transitions.unfiltered_length
        if kept == 0:
            continue
        size = len(transitions)
        members[name], weights[name] = transitions, size if weight is None or not size else weight * kept
        if not size:
            nothing = f"set {name!r}: {format}={folder} gives no {split} episodes (at least one of them is held out)"
            if split == "train":
                raise UserError(f"{nothing}; leave it out of data.sets")
            log.warning("%s; it is not measured", nothing)
    mixture = Mixture(members, weights, length or unfiltered_length)
    return StreamingMixture(mixture, **stream) if stream and split == "train" else mixture


def build_open_x_mixture(
    root: str | Path,
    *,
    human_root: str | Path,
    names: Collection[str] | None = None,
    human_fraction: float = 1.0,
    **options: Any,
) -> Mixture | StreamingMixture:
    """Build Table 12: the 26 robot sets under `root` and Ego4D as a video set, drawn with the paper's shares.

    `names` selects robot sets, of which the shares are normalized. The other options are those of `build_mixture`.
    Raises UserError for an unknown name.
    """
    names = list(OXE) if names is None else list(names)
    unknown = set(names) - set(OXE)
    if unknown:
        raise UserError(f"unknown Open X-Embodiment sets {sorted(unknown)}; known: {', '.join(OXE)}")
    sets: dict[str, dict[str, Any]] = {}
    windows = official_windows()
    for name in names:
        row = OXE[name]
        sets[name] = {
            "rlds": rlds.find_version_folder(root, row.folders, row.version),
            "weight": row.share,
            "fps": row.hz,
            "image": row.image,
            "text": row.text,
            "encoding": row.encoding,
            "window": windows[name],
        }
    sets["ego4d"] = {"video": human_root, "weight": HUMAN_SHARE, "human": True, "window_seconds": HUMAN_SECONDS}
    return build_mixture(sets, human_fraction=human_fraction, **options)
