"""Settings of the coupled policy, one dataclass per subject (Sec. 3.3-3.4, Tables 1, 4 and 9).

Each class checks its own values and raises UserError for values that cannot be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UserError

PARTS = ("gfdm", "gidm", "projector", "video_former", "adapter")
TRAINABLE = {  # rows of Table 9; the parts that have no pretraining always learn
    "adapter": ("projector", "video_former", "adapter"),
    "gfdm_adapter": ("gfdm", "projector", "video_former", "adapter"),
    "gidm_adapter": ("gidm", "projector", "video_former", "adapter"),
    "all": PARTS,
}
STREAMS = ("video", "latent", "future", "now")
CODEBOOKS = ("frozen", "learned")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass
class ObservationConfig:
    """How the policy sees: the cameras and the frozen parts that read their pictures."""

    views: Sequence[str]  # names of the cameras, in order (Table 1)
    image_size: int = 256  # pixels a side of the pictures that both models get
    blind: bool = False  # True: all pictures are zero, in training and in use (a baseline)
    imagine_seed: int = 0  # of the noise that the forward model denoises; the release draws new noise at every look
    precision: str = "auto"  # bf16 | fp32 of the parts that read pictures; auto: bf16 where the hardware is fast at it

    def __post_init__(self) -> None:
        self.views = tuple(self.views)
        if not self.views or len(set(self.views)) != len(self.views):
            raise UserError(f"policy.observation.views={list(self.views)}: name one or more cameras, each once")
        if self.precision not in PRECISIONS:
            raise UserError(f"policy.observation.precision={self.precision!r}: choose one of {list(PRECISIONS)}")


@dataclass
class PairingConfig:
    """Which pairs of frames the inverse model reads: the present frame, and an imagined one of the same view."""

    frames: Sequence[int]  # numbers of the imagined frames; at stride 2 of 30 Hz, frame 15 lies one second ahead
    views: Sequence[str] | None = None  # None: all views that the policy sees; the release pairs the static view only

    def __post_init__(self) -> None:
        self.frames = tuple(self.frames)
        self.views = None if self.views is None else tuple(self.views)
        if not self.frames:
            raise UserError("policy.pairing.frames is empty: name one or more imagined frames")


@dataclass
class StreamsConfig:
    """What the action adapter reads besides the sentence: named streams of tokens.

    "video" holds the tokens of the video former, which reads all imagined frames. "latent" holds the latent actions,
    embedded. "future" holds the projected frames of all views, averaged to `fuse_grid` tokens a side (Sec. 3.3). "now"
    holds the visual tokens of the present; it is not in the paper, and it lets the adapter bypass both models.
    """

    names: Sequence[str] = ("video", "latent")
    fuse_grid: int = 4  # tokens a side to which the streams "future" and "now" are averaged
    standardize: bool = True  # scale features, sentence and streams to mean 0 and deviation 1 over the training data

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        if not self.names or set(self.names) - set(STREAMS) or len(set(self.names)) != len(self.names):
            raise UserError(
                f"policy.streams.names={list(self.names)}: name one or more of the streams {list(STREAMS)}, each once"
            )


@dataclass
class AlignmentConfig:
    """The loss that teaches the projector the visual tokens that the inverse model sees in the true future frames."""

    weight: float = 0.0
    steps: int = 0  # optimizer steps at the start of training in which this is the only loss

    def __post_init__(self) -> None:
        if self.steps and not self.weight:
            raise UserError(
                f"policy.alignment.steps={self.steps} with policy.alignment.weight=0: nothing would be learned in "
                "these steps; set a weight above 0, or steps=0"
            )


@dataclass
class BottleneckConfig:
    """What happens to the discrete latent actions of the inverse model in finetuning."""

    weight: float = 1.0  # of the inverse model's bottleneck loss
    codebook: str = "frozen"  # frozen: the codes stay as pretraining made them; learned: they train on
    restart_codes: bool = False  # True: codes that are not used restart, as in pretraining; for learned codes only

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise UserError(f"policy.bottleneck.codebook={self.codebook!r}: choose one of {list(CODEBOOKS)}")
        if self.restart_codes and self.codebook == "frozen":
            raise UserError(
                "policy.bottleneck.restart_codes=true with codebook=frozen: only learned codes can restart; "
                "set policy.bottleneck.codebook=learned"
            )


def trainable_parts(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The parts that learn, in the order of PARTS. `choice` is a row of Table 9 (see TRAINABLE) or a list of parts."""
    if isinstance(choice, str):
        if choice not in TRAINABLE:
            raise UserError(
                f"policy.trainable={choice}: choose one of {list(TRAINABLE)}, or a list of parts from {list(PARTS)}"
            )
        choice = TRAINABLE[choice]
    if unknown := sorted(set(choice) - set(PARTS)):
        raise UserError(f"policy.trainable: no part is called {unknown}; the parts are {list(PARTS)}")
    return tuple(name for name in PARTS if name in choice)
