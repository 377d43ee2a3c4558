"""Files are complete or absent."""

from __future__ import annotations

import pytest

from common.files import atomic_path, write_text


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "deep/a.json"
    with atomic_path(file) as part:
        part.write_text("new")
        assert part.suffix == ".json" and part.parent == file.parent and not file.exists()
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_path(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
