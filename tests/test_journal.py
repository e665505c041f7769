"""The journal of JSON lines: grows line by line, held by one process, healed after a kill."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from gella.captions.run import open_captions
from gella.utils.journal import Journal


def record(image_id: int | str, prompt_id: str = "p") -> dict[str, Any]:
    said = {"description": "Snøw \u2019.", "nouns": ["Snøw"], "model": "m"}
    return {"prompt_id": prompt_id, "image_id": image_id, "file_name": f"{image_id}.png", **said}


def note(entry: Any) -> tuple[str, int]:
    return str(entry["image_id"]), int(entry["size"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "c.jsonl"


def test_it_grows_line_by_line_and_is_taken_up_again(path):
    with open_captions(path) as file:
        file.append(record(1))
        file.append(record("x", "q"))
        with pytest.raises(ValueError, match="another process"):
            open_captions(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [record(1), record("x", "q")]
    with open_captions(path) as file:
        assert file.entries == {("1", "p"): ("1.png", "m"), ("x", "q"): ("x.png", "m")}
        assert file.read(("x", "q")) == record("x", "q")
        file.remove()
    assert not path.exists()


@pytest.mark.parametrize("settings", [None, {"sizes": (1, 2)}])
def test_every_cut_of_the_last_line_is_healed(path, settings, caplog):
    def write_what_is_missing():
        with Journal(path, note, settings=settings) as file:
            for number in (1, 2):
                if str(number) not in file.entries:
                    file.append({"image_id": number, "size": 3})

    write_what_is_missing()
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) + 1):
        path.write_bytes(whole[:length])
        write_what_is_missing()
        assert path.read_bytes() == whole
    assert "half-written last line" in caplog.text
    path.write_bytes(whole + b"\0\0\0")  # what some file systems leave after a power failure
    with Journal(path, note, settings=settings) as file:
        assert file.entries == {"1": 3, "2": 3}
    assert path.read_bytes() == whole


def test_entries_of_other_settings_are_refused_and_a_later_entry_counts(path, caplog):
    with Journal(path, note, settings={"a": 1}) as file:
        for size in (3, 4):
            file.append({"size": size, "image_id": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path} was begun with other settings.*delete it"):
        Journal(path, note, settings={"a": 2})
    with Journal(path, note, settings={"a": 1}) as file:
        assert file.entries == {"1": 4} and file.read("1")["size"] == 4
    assert path.read_bytes() == before and "1 entries stand there more than once" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"images": []}', "line 1.*no proper field 'image_id'"),
        (b'{"images": [', "line 1.*no JSON"),
        (b"notes to keep", "line 1.*no JSON"),
        (b'{"made_', "line 1.*no JSON"),
        (b'{"image_id": 1, \n{}\n', "line 1.*no JSON"),
        (b"3\n", "line 1.*no object"),
        (json.dumps(record(1)).encode() + b"\n{}\n", "line 2.*repair or remove it"),
        (json.dumps({**record(1), "nouns": "a"}).encode() + b"\n", "'nouns'"),
        (json.dumps({**record(1), "model": None}).encode() + b"\n", "'model'"),
    ],
)
def test_other_files_are_named_and_left_alone(tmp_path, content, reason):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_captions(path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="is a folder"):
        open_captions(tmp_path)


def test_a_full_disk_leaves_no_half_line(path, monkeypatch):
    with open_captions(path) as file:
        file.append(record(1))
        before = path.read_bytes()
        write = os.write

        def full(handle: int, data: bytes) -> int:
            if len(data) < 30:
                raise OSError(28, "No space left on device")
            return write(handle, data[:-20])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.append(record(2))
        monkeypatch.undo()
        assert path.read_bytes() == before
        file.append(record(2))
    assert len(path.read_text().splitlines()) == 2
