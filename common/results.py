"""Generate the tables of the README and of docs/results from the raw files in results/.

A folder of results/ holds what a few runs left behind and a results.json, which says for each run its commands, commit
and seed, and for each row of a table which number of which raw file stands in which column. A number that no raw file
holds cannot be printed. The tables stand between the markers <!-- table: NAME --> and <!-- end of table -->.

Examples:
    python -m common.results
    python -m common.results --check
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import MissingFileError, UserError
from common.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS_FILE = "results.json"
CHAIN = ("1", "2", "3", "4", "5", "Avg. Len.")
TABLES = {  # name of a table -> its columns; the text columns come first, and every table ends with the raw files
    "rollouts": ("policy", "scene", "chains", *CHAIN),
    "lifts": ("policy", "scene", "trials", "success"),
    "forecast": ("forecast", "PSNR (dB)", "SSIM"),
    "inverse": ("model", "MSE", "copying the present", "another pair's latent action", "codes in use", "perplexity"),
    "streams": ("policy", "stream", "another window's", "of motion", "of the gripper", "the mean", "spread / rms"),
    "finetuning": ("policy", "step", "action loss", "latent actions swapped", "projector", "copying", "codes in use"),
    "commitment": ("step", "weight 0.25", "weight 0", "loss, weight 0.25", "loss, weight 0"),
    "readme": ("policy", "scene", "trials", "1", "2", "3", "Avg. Len."),
}
TEXT_COLUMNS = {"policy", "scene", "chains", "trials", "forecast", "model", "stream"}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


class Row(NamedTuple):
    """A row of a table: the folder in results/ that it comes from, and what results.json says about it."""

    folder: Path
    spec: Mapping[str, Any]


def read_results(root: Path = ROOT) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, content of its results.json) of every folder in results/, sorted by name."""
    for path in sorted((root / "results").glob(f"*/{RESULTS_FILE}")):
        try:
            yield path.parent, json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: this is not JSON ({error}); correct it") from error


def rows_of(table: str, root: Path = ROOT) -> list[Row]:
    """The rows of a table, in the order of the folders and of their results.json."""
    return [
        Row(folder, spec)
        for folder, results in read_results(root)
        for spec in results["rows"]
        if table in spec["tables"]
    ]


def cell(row: Row, column: str) -> str:
    """The text of a cell: text columns as results.json has them, numbers as their raw file has them."""
    text, cells = row.spec.get("text", {}), row.spec.get("cells", {})
    if column in text and column in TEXT_COLUMNS:
        return str(text[column])
    source = cells.get(column, cells.get("*"))
    return "" if source is None else read_number(row.folder, source, column)


def read_number(folder: Path, source: Mapping[str, Any], column: str) -> str:
    """The number that `source` names, as text.

    source["file"] is a raw file in `folder`. In a Markdown table source["row"] is the text of the row's first cell, and
    source["column"] that of the column, by default the column of our table. In a .jsonl file source["step"] and
    source["key"] name the number, and source["format"] how it is printed, by default with three decimals. In a
    results.json of step3_defi.eval, source["horizon"] is the number of steps that a sub-task may take.
    """
    path = folder / source["file"]
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist, but {folder / RESULTS_FILE} takes the column {column!r} from it"
        )
    readers = {".md": _from_markdown, ".jsonl": _from_log, ".json": _from_rollout}
    if path.suffix not in readers:
        raise UserError(f"{path}: numbers are read from {', '.join(readers)} files only")
    number = readers[path.suffix](path, source, column)
    if number is None:
        raise UserError(
            f"{path} holds no number for {dict(source)}, column {column!r}; correct {folder / RESULTS_FILE}"
        )
    return number


def _from_markdown(path: Path, source: Mapping[str, Any], column: str) -> str | None:
    wanted, header = source.get("column", column), []
    for line in path.read_text().splitlines():
        if not line.startswith("|"):
            header = []
            continue
        values = [value.strip() for value in line.strip().strip("|").split("|")]
        if not header:
            header = values
        elif values[0] == source["row"] and wanted in header:
            return values[header.index(wanted)].replace("**", "")
    return None


def _from_log(path: Path, source: Mapping[str, Any], column: str) -> str | None:
    for line in path.read_text().splitlines():
        logged = json.loads(line)
        if logged["step"] == source["step"] and source["key"] in logged:
            return format(logged[source["key"]], source.get("format", ".3f"))
    return None


def _from_rollout(path: Path, source: Mapping[str, Any], column: str) -> str | None:
    horizon = json.loads(path.read_text())["horizons"].get(str(source["horizon"]))
    if horizon is None:
        return None
    name = source.get("column", column)
    if name == "Avg. Len.":
        low, high = horizon["avg_len_ci95"]
        return f"{horizon['avg_len']:.2f} [{low:.2f}, {high:.2f}]"
    if name not in horizon["chain_sr"]:
        return None
    low, high = horizon["chain_sr_ci95"][name]
    return f"{100 * horizon['chain_sr'][name]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def markdown_table(table: str, page: Path, root: Path = ROOT) -> str:
    """The table as Markdown. Links to raw files are relative to the folder of `page`."""
    columns = TABLES[table]
    lines = ["| " + " | ".join([*columns, "raw"]) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows_of(table, root):
        cells = [cell(row, column) for column in columns]
        files = dict.fromkeys(source["file"] for source in row.spec["cells"].values())
        up = "../" * len(page.parent.relative_to(root).parts)
        links = ", ".join(f"[{name}]({up}{row.folder.relative_to(root).as_posix()}/{name})" for name in files)
        lines.append("| " + " | ".join([*cells, links]) + " |")
    return "\n".join(lines) + "\n"


def with_tables(text: str, page: Path, root: Path = ROOT) -> str:
    """The text of a page with its tables generated anew."""

    def generate(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise UserError(f"{page}: there is no table {match[2]!r}; the tables are {', '.join(TABLES)}")
        return match[1] + markdown_table(match[2], page, root) + match[3]

    return MARKED.sub(generate, text)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold tables: the README and all of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def stale_pages(root: Path = ROOT) -> list[Path]:
    """The pages whose tables are not those that the raw files give."""
    return [page for page in pages(root) if page.read_text() != with_tables(page.read_text(), page, root)]


def main() -> None:
    """Write the tables, or with --check name the pages that are stale and exit with status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    check = parser.parse_args().check
    try:
        stale = stale_pages()
        for page in [] if check else stale:
            write_text(page, with_tables(page.read_text(), page))
    except UserError as error:
        sys.exit(f"error: {error}")
    names = ", ".join(page.relative_to(ROOT).as_posix() for page in stale)
    if check and stale:
        sys.exit(f"error: the tables of {names} are out of date; run python -m common.results")
    sys.stdout.write(f"written: {names}\n" if stale else "All tables are up to date.\n")


if __name__ == "__main__":
    main()
