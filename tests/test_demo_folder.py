"""The demo over folders: one page, resume, failures among good ones, hostile names, Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from demo_scenes import CAPTION, Fake, Page, fake, run, scene, three, tokens, tree
from PIL import Image

from gella.commands import demo_run
from gella.commands.demo_inputs import plain
from gella.entities.entity_map import id_to_rgb

__all__ = ["fake", "run", "three"]  # fixtures
SCRIPT = "</p><script>alert(1)</script><img src=x onerror=alert(1)> & \"quotes' </svg>"


def test_a_folder_becomes_one_page(run: Any, three: Path, tokenizer_dir: Path) -> None:
    lines = [
        {"image": "c", "caption": "The sand and a star.", "nouns": ["The sand", "a star"]},
        {"image": "a.png", "caption": CAPTION, "nouns": ["A red circle", "the sand"]},
        {"image": "a.png", "caption": "One circle.", "nouns": ["One circle"]},
    ]
    file = three.parent / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run("--captions", file, opts=tokens(tokenizer_dir))
    assert code == 0, err
    assert "1 of 3 pictures have no caption" in out and "next: open" in out
    out_dir = three.parent / "out"
    stems = ("a", "a_2", "sub__c")
    ends = ("{}.json", "{}_grounding.png", "{}_colormap.png", "page/{}.html", "page/{}.png")
    assert tree(out_dir) == {"index.html", *(end.format(s) for s in stems for end in ends)}
    html = Page(out_dir / "index.html")
    figures = [a["id"] for t, a in html.tags if t == "figure"]
    assert len(figures) == len(set(figures)) == 3
    assert html.text.index(CAPTION.split(" lies")[1]) < html.text.index("One circle")
    assert html.text.count("a.png") == 2 and html.text.count("sub/c.png") == 1
    places = [unquote(place) for place in html.all("a", "href") + html.all("image", "href")]
    assert len(places) == 12 and all((out_dir / place).is_file() for place in places)
    nouns = [a for t, a in html.tags if "data-noun" in a]
    assert [a["data-noun"] for a in nouns] == ["0", "1", "0", "0", "1"]
    content = json.loads((out_dir / "sub__c.json").read_text())
    assert content["caption"] == "The sand and a star." and content["height"] == 30
    assert [noun["noun"] for noun in content["nouns"]] == ["The sand", "a star"]


def test_a_second_run_does_only_what_changed(run: Any, three: Path, fake: type[Fake]) -> None:
    def asked(*more: Any, **options: Any) -> int:
        fake.asked.clear()
        code, _, err = run("--caption", CAPTION, *more, **options)
        assert code == 0, err
        assert len(Page(three.parent / "out" / "index.html").all("figure", "id")) == 3
        return len(fake.asked)

    out_dir = three.parent / "out"
    assert asked() == 3
    before = {path: (out_dir / path).read_bytes() for path in tree(out_dir)}
    assert asked() == 0
    assert {path: (out_dir / path).read_bytes() for path in tree(out_dir)} == before
    scene(three, "a.png", 9)
    assert asked() == 1 and fake.asked[0][0] == "ground"
    ids = np.ones((30, 40), np.int32)
    ids[3:15, 5:25] = 2
    Image.fromarray(id_to_rgb(ids)).save(three / "b_masks.png")
    assert asked() == 1
    (out_dir / "b_colormap.png").unlink()
    assert asked() == 1
    (out_dir / "a.json").write_text((out_dir / "a.json").read_text()[:40])
    assert asked() == 1
    assert asked("--nouns", "the sand") == 3
    assert asked("--nouns", "the sand", opts=("INPUT.GELLA.COLORS", "location")) == 3
    assert asked("--nouns", "the sand", "--overwrite", opts=("INPUT.GELLA.COLORS", "location")) == 3
    assert asked("--nouns", "the sand", opts=("INPUT.GELLA.COLORS", "location")) == 0


def test_extracting_is_not_taken_for_given_nouns(run: Any, three: Path, fake: type[Fake]) -> None:
    line = {"image": "a.png", "caption": CAPTION, "nouns": ["the sand"]}
    (three.parent / "c.jsonl").write_text(json.dumps(line))
    run("--captions", three.parent / "c.jsonl")
    assert run("--captions", three.parent / "c.jsonl", "--extract")[0] == 0
    assert len(fake.asked) == 2
    content = json.loads((three.parent / "out" / "a.json").read_text())
    assert [noun["noun"] for noun in content["nouns"]] == ["circle"]


def test_other_weights_do_all_again(run: Any, three: Path, fake: type[Fake]) -> None:
    weights = three.parent / "w.pth"
    weights.write_bytes(b"one")
    arguments = ("--caption", CAPTION, "--weights", weights)
    run(*arguments)
    run(*arguments)
    assert len(fake.asked) == 3
    weights.write_bytes(b"other")
    run(*arguments)
    assert len(fake.asked) == 6


def test_bad_pictures_among_good_ones(run: Any, three: Path, fake: type[Fake]) -> None:
    out_dir = three.parent / "out"
    (three / "bad.png").write_bytes(b"no picture")
    (three / "bad_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    cut = (three / "a.png").read_bytes()[:500]
    (three / "cut.png").write_bytes(cut)
    (three / "cut_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    scene(three, "unmasked.png", 5, masks=False)
    scene(three, "nan.png", 6, masks=False)
    np.savez(three / "nan_masks.npz", masks=np.full((1, 30, 40), np.nan))
    huge = Image.new("1", (20000, 20000))
    huge.save(three / "huge.png")
    (three / "huge_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    code, out, err = run("--caption", CAPTION)
    assert code == 1 and "3 done, 5 failed" in out and "Traceback" not in err
    failures = json.loads((out_dir / "failures.json").read_text())
    reasons = {item["image"]: item["reason"] for item in failures}
    assert list(reasons) == ["bad.png", "cut.png", "huge.png", "nan.png", "unmasked.png"]
    assert "no picture" in reasons["bad.png"] and "truncated" in reasons["cut.png"]
    assert "too large to open" in reasons["huge.png"] and "no masks" in reasons["unmasked.png"]
    assert "nan_masks.npz" in reasons["nan.png"]
    html = Page(out_dir / "index.html")
    assert len(html.all("figure", "id")) == 3 and "Failed: 5" in html.text
    assert reasons["bad.png"] in html.text
    assert f"failed: cut.png: {reasons['cut.png']}" in out and "next: mend these" in out
    for name in ("bad", "cut", "huge", "nan", "unmasked"):
        scene(three, f"{name}.png", 7)
    (three / "nan_masks.npz").unlink()
    fake.asked.clear()
    code, out, _ = run("--caption", CAPTION)
    assert code == 0 and len(fake.asked) == 5 and "3 of 8 were done before" in out
    assert not (out_dir / "failures.json").exists()
    assert "Failed" not in Page(out_dir / "index.html").text


def test_a_caption_that_the_model_refuses_fails_alone(
    run: Any, three: Path, fake: type[Fake]
) -> None:
    (three.parent / "c.txt").write_text(f"a.png\t{CAPTION}\nb.png\traise\n")
    code, out, _ = run("--captions", three.parent / "c.txt")
    assert code == 1 and "failed: b.png: this caption is not liked" in out
    (three / "c.txt").write_text("raise")
    code, _, err = run("--caption", "raise", input="in/a.png")  # alone it is an error
    assert code == 2 and err == "error: this caption is not liked\n"


def test_hostile_names_and_captions(run: Any, tmp_path: Path, fake: type[Fake]) -> None:
    names = ["<img src=x onerror=alert(1)>\"'&.png", "n\nl\x1b[31m.png", "é図%23#?.png", "-x.png"]
    names += ["x.png", "X.PNG", "sub/x.png", "failures.png", "b\udcff.png"]
    for seed, name in enumerate(names):
        scene(tmp_path / "in", name, seed)
    scene(tmp_path / "in", "x.jpg", 40, masks=False)
    lines = [{"image": name, "caption": f"{k} {SCRIPT}"} for k, name in enumerate(names)]
    lines += [{"image": "x.jpg", "caption": SCRIPT + "\u202e\u2028", "nouns": ["<b>", SCRIPT]}]
    lines += [{"image": name, "caption": "out"} for name in ("../../x.png", "/etc/passwd", "..")]
    lines += [{"image": names[1], "caption": "\ud83d", "masks": "../../../etc/passwd"}]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = tree(tmp_path)
    code, out, err = run("--captions", file)
    assert code == 1, err  # the masks /etc/passwd
    assert out.count("is no picture of --input") == 3 and "\x1b" not in out + err
    new = tree(tmp_path) - before
    assert all(path.startswith("out/") for path in new)
    assert len([path for path in new if path.endswith(".json")]) == len(names) + 2
    assert {path.count("/") for path in new} == {1, 2}
    html = Page(tmp_path / "out" / "index.html")
    tags = [tag for tag, _ in html.tags]
    assert tags.count("script") == tags.count("b") == 1 and "img" not in tags  # <b>: the failure
    assert not [name for _, a in html.tags for name in a if name.startswith("on")]
    for k, name in enumerate(names):
        assert f"{k} {SCRIPT}" in html.text and plain(name) in html.text
    places = html.all("a", "href") + html.all("image", "href")
    assert all((tmp_path / "out" / unquote(place)).is_file() for place in places)
    assert len(set(html.all("image", "href"))) == len(names) + 1
    contents = [json.loads((tmp_path / path).read_text()) for path in new if path[-5:] == ".json"]
    captions = [item["caption"] for item in contents if isinstance(item, dict)]
    assert sorted(captions)[: len(names)] == [f"{k} {SCRIPT}" for k in range(len(names))]


def test_names_and_captions_of_bytes_that_are_no_text(
    run: Any, tmp_path: Path, fake: type[Fake]
) -> None:
    scene(tmp_path / "in", "a\udcff.png", 1)
    (tmp_path / "m\udcff").mkdir()
    (tmp_path / "in" / "a\udcff_masks.png").rename(tmp_path / "m\udcff" / "a\udcff.png")
    code, out, err = run("--caption", "a \udcff", "--masks", tmp_path / "m\udcff")
    assert code == 0, err
    content = json.loads((tmp_path / "out" / "a_.json").read_text())
    assert content["caption"] == "a \ufffd" and content["masks"].endswith("/m\ufffd")


def test_ctrl_c_ends_after_the_batch_and_the_next_run_goes_on(
    run: Any, tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(6):
        scene(tmp_path / "in", f"{k}.png", k)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(fake, "during", lambda: signal.raise_signal(signal.SIGINT))
    arguments = ("--caption", CAPTION, "--batch-size", "2")
    code, out, err = run(*arguments)
    assert code == 130 and "2 done, 0 failed" in out and "stopping after" in err
    assert "next: the same command goes on" in out
    html = Page(tmp_path / "out" / "index.html")
    assert len(html.all("figure", "id")) == 2 and "2 of 6 done" in html.text
    monkeypatch.setattr(fake, "during", lambda: signal.raise_signal(signal.SIGTERM))
    code, out, _ = run(*arguments)
    assert code == 143 and "2 of 6 were done before" in out and len(fake.asked) == 4

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fake, "during", twice)
    code, out, err = run(*arguments)
    assert code == 130 and "the same command goes on" in err and len(fake.asked) == 4
    assert "4 of 6 done" in Page(tmp_path / "out" / "index.html").text
    monkeypatch.setattr(fake, "during", lambda: None)
    assert run(*arguments)[0] == 0 and len(fake.asked) == 6
    assert handlers == [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]


def test_the_page_is_there_while_the_run_goes_on(
    run: Any, three: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    page = three.parent / "out" / "index.html"
    monkeypatch.setattr(demo_run, "_REFRESH", 0.0)
    monkeypatch.setattr(demo_run, "_TIMES", 0)
    monkeypatch.setattr(
        fake, "during", lambda: seen.append(page.exists() and Page(page).text.count("lies on"))
    )
    assert run("--caption", CAPTION, "--batch-size", "1")[0] == 0
    assert seen == [False, 1, 2]
