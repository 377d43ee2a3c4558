"""What the inverse model is pretrained on: sets of transitions drawn by weight (Sec. 3.2, A.2, Table 12, Fig. 8)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common import human_video, rlds
from common.mixture import Mixture
from step2_gidm.data.oxe import HUMAN_SECONDS, HUMAN_SHARE, OXE, official_windows
from step2_gidm.data.pairs import Transitions
from step2_gidm.data.stream import StreamingMixture
from step2_gidm.data.transitions import CalvinTransitions, RldsTransitions, VideoTransitions

KINDS: dict[str, type[Transitions]] = {"video": VideoTransitions, "rlds": RldsTransitions, "calvin": CalvinTransitions}

log = logging.getLogger(__name__)


def mixture(
    sets: Mapping[str, Mapping[str, Any]],
    *,
    split: str = "train",
    human_fraction: float = 1.0,
    length: int | None = None,
    augment: bool = False,
    stream: Mapping[str, Any] | None = None,
    **pairs: Any,
) -> Mixture | StreamingMixture:
    """Sets drawn by weight. Each set: one of {video, rlds, calvin: folder}, and optionally weight, human, and what its
    class takes.

    Without a weight a set counts by its size. `human_fraction` keeps that share of the videos of sets marked `human`
    and of their weight
    (common.human_video, Fig. 8). `length` is how many draws count as an epoch; None: as many as there are episodes, those of
    all human video
    included. At `human_fraction` 0 the human sets need not be on disk where `length` is given. Only training augments,
    and only training
    reads in a stream: `stream` holds what Stream takes, None reads every pair by random access.
    """
    kept_fractions = human_video.kept_fractions(sets, human_fraction)
    pairs = {**pairs, "augment": augment and split == "train"}
    members: dict[str, Transitions] = {}
    weights: dict[str, float] = {}
    unfiltered_length = 0
    for name, options in sets.items():
        options, share = dict(options), kept_fractions[name]
        weight = options.pop("weight", None)
        options.pop("human", None)
        if weight == 0 or (share == 0 and length is not None):
            continue
        kinds = KINDS.keys() & options.keys()
        if len(kinds) != 1:
            raise ValueError(
                f"set {name!r} needs one of {', '.join(f'{kind}=<folder>' for kind in KINDS)}, got {sorted(options)}"
            )
        kind = kinds.pop()
        folder = options.pop(kind)
        if kind == "video":
            options["fraction"] = share
        elif 0 < share < 1:
            raise ValueError(f"set {name!r}: human_fraction={human_fraction} keeps a part of video sets, not of {kind}")
        with human_video.explain_missing_set(name, share):
            episodes = KINDS[kind](folder, split, **pairs | options)
        unfiltered_length += episodes.unfiltered_length
        if share == 0:
            continue
        size = len(episodes)
        members[name], weights[name] = episodes, size if weight is None or not size else weight * share
        if not size:
            nothing = f"set {name!r}: {kind}={folder} gives no {split} episodes (one of them at least is held out)"
            if split == "train":
                raise ValueError(f"{nothing}; leave it out of data.sets")
            log.warning("%s; it is not measured", nothing)
    mix = Mixture(members, weights, length or unfiltered_length)
    return StreamingMixture(mix, **stream) if stream and split == "train" else mix


def build_open_x_mixture(
    root: str | Path,
    *,
    human_root: str | Path,
    names: Collection[str] | None = None,
    human_fraction: float = 1.0,
    **options: Any,
) -> Mixture | StreamingMixture:
    """Table 12: the 26 robot sets under `root` and Ego4D as a video set, drawn with the paper's shares.

    `names` restricts the robot sets; shares are normalised. Everything else is `mixture`'s.
    """
    names = list(OXE) if names is None else list(names)
    unknown = set(names) - set(OXE)
    if unknown:
        raise ValueError(f"unknown Open X-Embodiment sets {sorted(unknown)}; known: {', '.join(OXE)}")
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
    return mixture(sets, human_fraction=human_fraction, **options)
