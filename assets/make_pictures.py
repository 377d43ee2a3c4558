"""Make the pictures of the README from what the programs leave behind: films (mp4) and forecast strips (png).

    python assets/make_pictures.py rollout <film.mp4> ... --out assets/rollout.gif
    python assets/make_pictures.py forecast <strip.png> ... --out assets/forecast.png

A video of a video set has no caption of its own; --captions gives one to each film. docs/results/README.md has the
commands that made the pictures that are there.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT = 32  # pixels below a film, for two lines of text
LETTER_WIDTH = 6  # pixels
GAP = 6  # pixels between two films


def read_film(path: Path, every: int, length: int | None) -> list[Image.Image]:
    """Every `every`-th of the first `length` pictures of a film; None: of all pictures."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return frames[:length:every]


def with_caption(frame: Image.Image, caption: str) -> Image.Image:
    """`frame` with its caption below it, or `frame` where the caption is empty."""
    if not caption:
        return frame
    captioned = Image.new("RGB", (frame.width, frame.height + CAPTION_HEIGHT), "white")
    captioned.paste(frame, (0, 0))
    text = "\n".join(textwrap.wrap(caption, frame.width // LETTER_WIDTH)[:2])
    ImageDraw.Draw(captioned).text((3, frame.height + 3), text, fill="black", font=ImageFont.load_default(11))
    return captioned


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures next to each other on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


def rollout(
    films: list[Path], captions: list[str], out: Path, *, every: int, length: int | None, fps: int, colours: int
) -> None:
    """Write an endless GIF of films side by side; a film that is over shows its last picture."""
    captions = captions or [""] * len(films)
    if len(captions) != len(films):
        raise SystemExit(f"error: {len(films)} films, but {len(captions)} captions")
    panels = [
        [with_caption(frame, text) for frame in read_film(path, every, length)] for path, text in zip(films, captions)
    ]
    count = max(len(panel) for panel in panels) + fps // 2  # the last pictures stay for half a second
    frames = [side_by_side([panel[min(time, len(panel) - 1)] for panel in panels]) for time in range(count)]
    sample = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: max(1, count // 8)]]))
    palette = sample.quantize(colours, method=Image.Quantize.MAXCOVERAGE)  # keeps the colours of small things
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    drawn[0].save(out, save_all=True, append_images=drawn[1:], duration=1000 // fps, loop=0, optimize=True)


def forecast(strips: list[Path], out: Path) -> None:
    """Write forecast strips of step1_gfdm.eval side by side."""
    side_by_side([Image.open(path).convert("RGB") for path in strips]).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["rollout", "forecast"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", nargs="*", default=[], help="one line of text for each film")
    parser.add_argument("--every", type=int, default=2, help="keep every so many-th picture of a film")
    parser.add_argument("--length", type=int, help="use only so many pictures of each film")
    parser.add_argument("--fps", type=int, default=15, help="pictures a second of the GIF")
    parser.add_argument("--colours", type=int, default=160, help="of the GIF; fewer make a smaller file")
    args = parser.parse_args()
    if args.kind == "forecast":
        forecast(args.files, args.out)
    else:
        rollout(
            args.files,
            args.captions,
            args.out,
            every=args.every,
            length=args.length,
            fps=args.fps,
            colours=args.colours,
        )


if __name__ == "__main__":
    main()
