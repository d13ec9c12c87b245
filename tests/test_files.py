"""Files that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from fxprune.files import write_json, write_whole


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_whole(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_where_writing_fails_the_old_file_stays(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(partial: Path) -> None:
        partial.write_text("ne")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_makes_its_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"rows": [1]})
    text = (tmp_path / "new" / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"rows": [1]}
