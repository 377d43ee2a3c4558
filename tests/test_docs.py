"""The pages: the links, paths, programs, keys and functions that they name exist; no number is without a raw file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from common import results, rows
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "step1_gfdm", "step2_gidm", "step3_defi", "envs", "benchmarks")
FOLDERS = (*ROOMS, "configs", "scripts", "tests", "docs", "results", "assets", ".ci", ".github")
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / folder / "README.md" for folder in ("data", "ckpts")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "results").rglob("README.md"),
    ]
)
RESULTS = sorted((ROOT / "results").glob("*/results.json"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
INTERVAL = re.compile(r"\d[^\S\n]*(?:%[^\S\n]*)?(?:\*\*)?[^\S\n]*\[-?\d[\d.]*, -?\d[\d.]*\]")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(text: str) -> Iterator[list[str]]:
    """The words of every line of every bash block."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;", line):
                yield shlex.split(command.strip(), comments=True)


@cache
def launched_by(script: str) -> str | None:
    """The program that a launcher passes its words to, or None."""
    found = re.search(r'(?:^launch|python -m) ([\w.]+) "\$@"', (ROOT / script).read_text(), flags=re.MULTILINE)
    return found[1] if found else None


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, words) of every program that a page calls: in bash blocks, in code within a line, in tables of keys."""
    inline = (shlex.split(code) for code in re.findall(r"`(python -m [^`]+|scripts/\w+\.sh[^`]*)`", strip_blocks(text)))
    for words in [*commands(text), *inline]:
        words = words[words.index("python") :] if "python" in words else words
        if words[:2] == ["python", "-m"]:
            yield words[2], words[3:]
        for place, word in enumerate(words):
            if re.fullmatch(r"scripts/\w+\.sh", word) and launched_by(word):
                yield launched_by(word), words[place + 1 :]
    for module, keys in re.findall(r"^\|[^|]*\| `([\w.]+)` \| [^|]*\| `([^`]*)` \|$", text, flags=re.MULTILINE):
        yield module, shlex.split(re.sub(r"<[^>]*>", "<>", keys))


def strip_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def module_file(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def config_of(module: str) -> str | None:
    """The config of a program, or None where it is no Hydra program."""
    found = re.search(r'\bprogram\(\s*"(\w+)"|config_name="(\w+)"', module_file(module).read_text())
    return (found[1] or found[2]) if found else None


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", strip_blocks(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_has_pictures():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 10_240
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
    assert {"assets/rollout.gif", "assets/diagram.svg", "assets/forecast.png"} <= set(pictures)
    assert all((ROOT / picture).stat().st_size < 1_500_000 for picture in pictures)


def test_every_page_of_docs_is_linked_from_the_readme_or_the_overview():
    linked = {
        (page.parent / link.split("#")[0]).resolve()
        for page in (ROOT / "README.md", ROOT / "docs/README.md", ROOT / "docs/results/README.md")
        for link in LINK.findall(page.read_text())
    }
    assert set((ROOT / "docs").rglob("*.md")) - linked <= {ROOT / "docs/README.md"}


@each_page
def test_relative_links_lead_somewhere(page: Path):
    for link in LINK.findall(strip_blocks(page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_paths_exist(page: Path):
    for code in re.findall(r"`([^`\n]+)`", strip_blocks(page.read_text())):
        for word in code.split():
            if word.split("/")[0] in FOLDERS and "/" in word and not re.search(r"[<>*{}$=]", word):
                assert (ROOT / word).exists() or (page.parent / word).exists(), word


@each_page
def test_programs_exist(page: Path):
    for module, _ in calls(page.read_text()):
        if module.split(".")[0] in ROOMS:
            assert module_file(module).is_file() and "__main__" in module_file(module).read_text(), module


@cache
def check_keys(module: str, words: tuple[str, ...]) -> None:
    """Compose the config of a program with the keys of a command; those with a placeholder are left out."""
    keys = [word for word in words if re.match(r"[+~]*[\w./@]+=", word) and not re.search(r"[<>$]", word)]
    if not keys or module.split(".")[0] not in ROOMS or config_of(module) is None:
        return
    if module == "step1_gfdm.convert" and not any(key.startswith("source=") for key in keys):
        keys.append("source=folder")
    rows.register()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        compose(config_of(module), overrides=keys)


@each_page
def test_keys_of_commands_exist(page: Path):
    for module, words in calls(page.read_text()):
        check_keys(module, tuple(words))


def test_rows_of_commands_exist():
    names = {row.split("/")[1] for row in rows.load()}
    for page in PAGES:
        for row in re.findall(r"reproduce_row\.sh(?: |` \| `)(\w+)", page.read_text()):
            assert row in names, (page, row)
        for row in re.findall(r"`(?:experiment=)?((?:gfdm|gidm|defi)/\w+)`", page.read_text()):
            assert row in rows.load() or row.split("/")[1] in ("tiny", "small", "full"), (page, row)


def test_the_tour_has_eight_stops_whose_functions_exist():
    page = (ROOT / "docs/design.md").read_text()
    stops = re.findall(r"^\| (\d) \| `([^`]+)` \| `([\w.]+)` \|", page, flags=re.MULTILINE)
    assert [number for number, _, _ in stops] == list("12345678")
    for _, file, function in stops:
        owner, _, name = function.rpartition(".")
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text and (not owner or f"class {owner}" in text), (file, function)


def test_the_tables_are_those_of_the_raw_files():
    stale = [page.relative_to(ROOT).as_posix() for page in results.stale_pages()]
    assert not stale, f"out of date: {stale}; run python -m common.results"


def test_every_table_is_printed_somewhere():
    printed = {name for page in results.pages() for _, name, _ in results.MARKED.findall(page.read_text())}
    assert printed == set(results.TABLES)


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_result_stands_outside_of_a_generated_table(page: Path):
    by_hand = results.MARKED.sub("", strip_blocks(page.read_text()))
    assert not INTERVAL.search(by_hand)
    if page.parent.name == "results" and page.name != "README.md":
        assert not [line for line in by_hand.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_results_json_names_commands_commits_seeds_and_files(path: Path):
    content = json.loads(path.read_text())
    assert content["title"] and content["machine"] and content["rows"]
    for run in content["runs"].values():
        assert run["what"] and run["commands"] and isinstance(run["seed"], int)
        assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
        trains = any(".train " in command for command in run["commands"])
        assert trains == bool(run["curves"])  # a run without training has no curves
        assert all((path.parent / name).is_file() for name in [*run["curves"], *run["files"]])
        for command in run["commands"]:
            words = shlex.split(command)
            assert words[:2] == ["python", "-m"] and module_file(words[2]).is_file()
            check_keys(words[2], tuple(words[3:]))
    for row in content["rows"]:
        assert row["run"] in content["runs"] and row["tables"] and row["cells"]
        assert set(row["tables"]) <= set(results.TABLES)


def test_a_number_without_a_file_stops_the_program(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("<!-- table: lifts -->\n<!-- end of table -->\n")
    folder = tmp_path / "results/run"
    folder.mkdir(parents=True)
    source = {"file": "table.md", "row": "DeFI", "column": "1"}
    row = {"run": "a", "tables": ["lifts"], "text": {"policy": "DeFI", "success": "99"}, "cells": {"success": source}}
    (folder / "results.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(UserError, match=r"table\.md does not exist"):
        results.with_tables(page.read_text(), page, tmp_path)
    (folder / "table.md").write_text("| | 1 |\n|---|---|\n| other | 5 |\n")
    with pytest.raises(UserError, match="holds no number"):
        results.with_tables(page.read_text(), page, tmp_path)
    (folder / "table.md").write_text("| | 1 |\n|---|---|\n| DeFI | **5.0** [1, 9] |\n")
    written = results.with_tables(page.read_text(), page, tmp_path)
    assert "| DeFI |  |  | 5.0 [1, 9] | [table.md](results/run/table.md) |" in written
    assert results.with_tables(written, page, tmp_path) == written


def test_numbers_of_a_log_and_of_a_rollout(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n{"step": 2, "b": 0.5}\n')
    log = {"file": "metrics.jsonl", "step": 2, "key": "b", "format": "+.0%"}
    assert results.read_number(tmp_path, log, "x") == "+50%"
    with pytest.raises(UserError, match="holds no number"):
        results.read_number(tmp_path, {**log, "key": "a"}, "x")
    horizon = {"avg_len": 1.5, "avg_len_ci95": [1.0, 2.0], "chain_sr": {"1": 0.9}, "chain_sr_ci95": {"1": [0.8, 1.0]}}
    (tmp_path / "rollout.json").write_text(json.dumps({"horizons": {"360": horizon}}))
    rollout = {"file": "rollout.json", "horizon": 360}
    assert results.read_number(tmp_path, rollout, "Avg. Len.") == "1.50 [1.00, 2.00]"
    assert results.read_number(tmp_path, rollout, "1") == "90.0 [80, 100]"
    with pytest.raises(UserError, match="holds no number"):
        results.read_number(tmp_path, rollout, "2")
