"""Write one self-contained HTML page of what a run left behind: tables, films, forecasts, latent actions, curves.

Pictures and films are embedded in the page. A piece that is missing is named on the page, and the rest is shown.

Examples:
    python -m step3_defi.report run=outputs/quickstart
    python -m step3_defi.report run=outputs/quickstart title="Seed 1" films=4 out=outputs/seed1.html
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from common.curves import draw_curves
from common.errors import UserError
from common.figures import pyplot
from common.files import write_text
from common.program import program
from step3_defi.rollout import film, journal, stats

LOG = logging.getLogger(__name__)
MISSING = (FileNotFoundError, KeyError, ValueError)  # the errors of reading a missing or unfinished piece
CURVES = {
    name: name
    for name in (
        "loss",
        "mse",
        "action_loss",
        "bottleneck_loss",
        "alignment_loss",
        "video_loss",
        "reconstruction_loss",
        "swap_latent",
        "mean_gfdm",
        "perplexity",
        "usage",
    )
}  # panel -> metric; a run has some of them
STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff;
}
h1 { font-size: 1.7rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #d5dae1; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e8ed; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; vertical-align: top; }
figcaption { font-size: .8rem; color: #5a6675; }
img { max-width: 100%; }
.missing { background: #fff4e0; border-left: 4px solid #e09b20; padding: .4rem .8rem; }
.wide { overflow-x: auto; }
"""


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole HTML document. Each section is (heading, HTML)."""
    body = "\n".join(f"<section><h2>{html.escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def or_missing(make: Callable[[], str], what: str) -> str:
    """What `make` returns, or a box that says what is missing."""
    try:
        return make()
    except MISSING as error:
        return missing(what, error)


def missing(what: str, error: Exception) -> str:
    """A box that says what is missing and why."""
    LOG.warning("%s is missing: %s", what, error)
    reason = f"no {error.args[0]!r} in it" if isinstance(error, KeyError) else str(error)
    return f'<p class="missing">{html.escape(what)} is missing: {html.escape(reason)}</p>\n'


def inline(path: Path, kind: str) -> str:
    """The content of a file as a data URI. `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(source: str, caption: str) -> str:
    """A figure of a picture, given as a data URI, with its caption."""
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>\n'


def movie(path: Path, caption: str) -> str:
    """A figure of an mp4 file, embedded, with its caption."""
    return (
        f'<figure><video controls loop muted playsinline width="300" src="{inline(path, "video/mp4")}"></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def curves(name: str, folder: Path) -> str:
    """The training curves of a run's folder: those of its metrics that CURVES names."""
    figure, buffer = draw_curves(folder, CURVES), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return picture(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", name)


def markdown_html(text: str) -> str:
    """HTML of the Markdown that our tables use: pipe tables, **bold** and paragraphs."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line for line in block.splitlines() if not re.fullmatch(r"[|\s:-]+", line)]
        if lines and all(line.startswith("|") for line in lines):
            rows = [[_bold(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
            head, *others = [
                [f"<{tag}>{cell}</{tag}>" for cell in row] for tag, row in zip(["th"] + ["td"] * len(rows), rows)
            ]
            cells = "\n".join(f"<tr>{''.join(row)}</tr>" for row in [head, *others])
            blocks.append(f'<div class="wide"><table>{cells}</table></div>')
        elif lines:
            blocks.append(f"<p>{_bold(' '.join(lines))}</p>")
    return "\n".join(blocks) + "\n"


def rollout_table(folders: Mapping[str, Path]) -> str:
    """The rows of Table 1, one for each folder of step3_defi.eval, next to the paper's row.

    The first row is compared with each of the others, and a table of the sub-tasks follows. `folders` maps labels to
    folders.
    """
    found, notes = {}, ""
    for label, folder in folders.items():
        try:
            found[label] = _json(folder / "results.json")
        except MISSING as error:
            notes += missing(f"The row {label!r}", error)
    if not found:
        places = ", ".join(str(folder) for folder in folders.values())
        raise UserError(f"none of {places} holds results; run step3_defi.eval")
    first = next(iter(found.values()))
    shared = set.intersection(*(set(results["horizons"]) for results in found.values()))
    if not shared:
        raise UserError(f"the rows of {', '.join(found)} share no horizon; roll out with equal horizon=")
    # CALVIN's horizon where all rows have it; each folder's table.md holds the other horizons.
    horizon = "360" if "360" in shared else max(shared, key=int)
    rows = {label: results["horizons"][horizon] for label, results in found.items()}
    table = stats.chain_table(rows, length=first["length"], paper=stats.paper_label(first["world"]))
    facts = (
        f"{first['world']}, {first['sequences']} sequences of {first['length']}, {horizon} steps a sub-task; "
        "95 % bootstrap intervals over sequences."
    )
    facts = f"{facts} {stats.caveat(first['world'], first['vocabulary'])}".rstrip()
    paired = [
        or_missing(
            lambda other=other: _paired(next(iter(found)), other, folders, int(horizon)),
            f"The comparison with {other!r}",
        )
        for other in list(found)[1:]
    ]
    tasks = _tasks(found)
    return markdown_html(f"{table}\n\n{facts}") + "".join(paired) + notes + markdown_html(tasks)


def _paired(a: str, b: str, folders: Mapping[str, Path], horizon: int) -> str:
    records = [journal.read(folders[label] / journal.JOURNAL_FILE) for label in (a, b)]
    row = stats.compare(*records, horizon)
    low, high = row["difference_ci95"]
    return (
        f"<p>{html.escape(a)} − {html.escape(b)}: {row['difference']:+.2f} tasks [{low:+.2f}, {high:+.2f}], "
        f"paired over {row['sequences']} sequences, p = {row['p_value']:.4f}</p>\n"
    )


def _tasks(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the success of every sub-task, one column for each row of the table above."""
    names = sorted({task for results in found.values() for task in results["tasks"]})
    lines = ["| sub-task | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for task in names:
        counts = [results["tasks"].get(task) for results in found.values()]
        lines.append(f"| {task} | " + " | ".join(f"{c['success']}/{c['total']}" if c else "–" for c in counts) + " |")
    return "\n".join(lines)


def films(folder: Path, count: int) -> str:
    """The films of the first `count` successes and failures."""
    found = film.find(folder / "videos")
    chosen = [(kind, path) for kind, paths in found.items() for path in paths[:count]]
    if not chosen:
        raise UserError(f"there are no films in {folder / 'videos'}; roll out with films.candidates above 0")
    captions = [
        "sequence {}: {} of {} tasks".format(*map(int, film.FILE_PATTERN.fullmatch(path.name).groups()))
        for _, path in chosen
    ]
    return "".join(movie(path, f"{kind}, {caption}") for (kind, path), caption in zip(chosen, captions))


def evaluation(folder: Path, pictures: str, count: int) -> str:
    """The table and the first pictures of an evaluation of step 1 or 2."""
    shown = sorted((folder / pictures).glob("*.png"))[:count]
    drawn = "".join(picture(inline(path, "image/png"), f"{pictures}/{path.name}") for path in shown)
    nothing = UserError(f"there are no pictures in {folder / pictures}; run the step's eval program")
    return or_missing(lambda: markdown_html(_text(folder / "table.md")), "The table") + (
        drawn or missing("A picture", nothing)
    )


def links(folder: Path) -> str:
    """The table and the bars of step3_defi.links."""
    return markdown_html(_text(folder / "table.md")) + picture(
        inline(folder / "links.png", "image/png"), "rise of the held-out action loss without each stream"
    )


def build(cfg: Mapping[str, Any]) -> str:
    """The page that the keys of configs/step3_report.yaml describe."""
    sections = []
    for title, rows in cfg["rollouts"].items():
        folders = {label: Path(folder) for label, folder in rows.items()}
        first = next(iter(folders.values()))
        table = or_missing(lambda folders=folders: rollout_table(folders), title)
        sections.append(
            (title, table + "<h3>Films</h3>\n" + or_missing(lambda first=first: films(first, cfg["films"]), "A film"))
        )
    sections += [
        (
            "What the forward model imagines",
            or_missing(lambda: evaluation(Path(cfg["forecast"]), "strips", cfg["pictures"]), "The forecast"),
        ),
        ("What the policy reads", or_missing(lambda: links(Path(cfg["links"])), "What each stream is worth")),
        (
            "What the latent actions carry",
            or_missing(lambda: evaluation(Path(cfg["codes"]), "attention", cfg["pictures"]), "The code usage"),
        ),
        (
            "Training",
            "".join(
                f"<h3>{html.escape(name)}</h3>\n"
                + or_missing(lambda name=name, folder=folder: curves(name, Path(folder)), name)
                for name, folder in cfg["training"].items()
            ),
        ),
    ]
    return page(cfg["title"], sections)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path))


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the program that writes it")
    return path.read_text()


def _bold(cell: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(cell))


@program("step3_report")
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    write_text(Path(cfg.out), build(settings))
    LOG.info("results in %s", cfg.out)


if __name__ == "__main__":
    main()
