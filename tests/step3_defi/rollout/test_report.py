"""The report page: everything is embedded and escaped, and a missing piece is named on the page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from common.files import write_text
from common.program import CONFIGS
from common.video import write_mp4
from step3_defi import report
from step3_defi.rollout import journal, stats


def rollouts(folder: Path, lengths: list[int]) -> None:
    records = [
        {
            "index": i,
            "initial_state": {},
            "tasks": list("abcde"),
            "steps_to_success": [9] * n + [None] * (n < 5),
            "clipped": 0,
            "seed": 0,
        }
        for i, n in enumerate(lengths)
    ]
    write_text(folder / journal.JOURNAL_FILE, "".join(json.dumps(r) + "\n" for r in records))
    results = {
        "world": "playtable-D",
        "vocabulary": None,
        "sequences": len(records),
        "length": 5,
        "tasks": stats.task_stats(records, 360),
        "horizons": {str(h): stats.chain_stats(records, h) for h in (280, 360)},
    }
    write_text(folder / "results.json", json.dumps(results))


def metrics(folder: Path, count: int = 50) -> None:
    lines = [
        json.dumps({"step": i, "time": 0.0, "train/loss": 1 / (i + 1), "train/perplexity": i / 9, "lr": 1e-4})
        for i in range(count)
    ]
    lines.append(json.dumps({"step": count, "val/loss": 0.1}))
    write_text(folder / "metrics.jsonl", "\n".join(lines) + '\n{"step": 51, "tr')


@pytest.fixture
def cfg(tmp_path: Path) -> dict[str, Any]:
    """A fabricated run with everything in its place, under the keys of the real configuration."""
    with initialize_config_dir(CONFIGS, version_base=None):
        composed = compose("step3_report", [f"run={tmp_path}", f"paths.ckpts={tmp_path}/ckpts"])
    settings = OmegaConf.to_container(composed, resolve=True)
    for folder in settings["training"].values():
        metrics(Path(folder))
    for key, pictures in (("forecast", "strips"), ("codes", "attention")):
        folder = Path(settings[key]) / pictures
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / "000.png")
        (folder.parent / "table.md").write_text(
            f"A <b>table</b> of {key}.\n\n| method | value |\n|---|---|\n| 1 step | **9.5** |\n"
        )
    bars = Path(settings["links"])
    bars.mkdir(parents=True)
    (bars / "table.md").write_text("| stream | cost |\n|---|---|\n| latent | **7.25** % |\n")
    Image.new("RGB", (8, 8), "blue").save(bars / "links.png")
    for rows in settings["rollouts"].values():
        for number, folder in enumerate(rows.values()):
            rollouts(Path(folder), [5 - number, 4 - number, 3 - number] * 4)
    first = Path(next(iter(settings["rollouts"].values()))["DeFI"])
    for name in ("0000_5of5.mp4", "0001_4of5.mp4"):
        write_mp4(first / "videos" / name, np.zeros((4, 32, 32, 3), np.uint8), 15)
    return settings


class Tags(HTMLParser):
    """Counts tags and fails on one that is closed out of turn."""

    void = {"meta", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags


def test_page_is_whole_and_self_contained(cfg: dict[str, Any]) -> None:
    page = report.build(cfg)
    tags = parse(page)
    assert tags.count["video"] == 2 and tags.count["img"] == 3 + len(cfg["training"])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for data in re.findall(r'src="data:[^;]+;base64,([^"]+)"', page):
        assert base64.b64decode(data, validate=True)
    assert "DeFI, paper, CALVIN ABC→D (another world than playtable-D)" in page
    assert "DeFI − blind: +1.00 tasks [+1.00, +1.00], paired over 12 sequences, p = 0.0" in page
    assert (
        "<b>4.00</b> [" in page
        and "sequence 1: 4 of 5 tasks" in page
        and "<b>9.5</b>" in page
        and "<b>7.25</b>" in page
    )
    assert "A &lt;b&gt;table&lt;/b&gt; of codes" in page
    assert page.count('class="missing"') == 2  # films of the other two tables


def test_the_page_says_what_keeps_its_numbers_from_the_papers(cfg: dict[str, Any]) -> None:
    first = Path(next(iter(next(iter(cfg["rollouts"].values())).values()))) / "results.json"
    for world, vocabulary, said in (
        ("playtable-D", None, "This world is not CALVIN"),
        ("calvin-D", ["open_drawer"], "is all its tasks in scene D"),
        ("calvin-A", None, "is all its tasks in scene D"),
        ("calvin-D", None, ""),
    ):
        write_text(first, json.dumps({**json.loads(first.read_text()), "world": world, "vocabulary": vocabulary}))
        table = report.rollout_table({"DeFI": first.parent})
        assert said in table and ("not comparable" in table) == bool(said)


def test_an_empty_run_still_makes_a_page(tmp_path: Path) -> None:
    with initialize_config_dir(CONFIGS, version_base=None):
        composed = compose("step3_report", [f"run={tmp_path}", f"paths.ckpts={tmp_path}/none"])
    page = report.build(OmegaConf.to_container(composed, resolve=True))
    parse(page)
    assert f"{tmp_path}/none/gfdm/tiny/metrics.jsonl does not exist; a training writes it" in page
    assert page.count('class="missing"') >= 10


@pytest.mark.parametrize(
    "broken,said",
    [
        ("blind/results.json", "blind"),
        ("ckpts/gidm/tiny/metrics.jsonl", "Inverse model"),
        ("ckpts/gfdm/tiny/eval/table.md", "The table"),
    ],
)
def test_one_broken_piece_leaves_the_rest(cfg: dict[str, Any], tmp_path: Path, broken: str, said: str) -> None:
    whole = report.build(cfg)
    (tmp_path / broken).write_text("{nonsense\n") if broken.endswith(("json", "jsonl")) else (
        tmp_path / broken
    ).unlink()
    page = report.build(cfg)
    parse(page)
    assert page.count('class="missing"') == whole.count('class="missing"') + 1
    assert re.search(rf'class="missing">[^<]*{said}', page)


def test_markdown_tables() -> None:
    assert "<th>a</th><th>b</th>" in report.markdown_html("| a | b |\n|---|---|\n| x<y | **2** |")
    assert "<td>x&lt;y</td><td><b>2</b></td>" in report.markdown_html("| a | b |\n|---|---|\n| x<y | **2** |")
