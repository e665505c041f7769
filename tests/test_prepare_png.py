"""The alignment report of PNG narratives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_scripts import prepare_small_shapes, registered, script
from prepare_png import alignment_report

from gella.data import register as datasets
from gella.text.spans import align_utterances

COCO_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "coco_sample" / "annotations"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare_small_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def damaged(root, tmp_path):
    """Narratives of which one noun and one piece of plain text are not in their captions."""
    narratives = json.loads((root / "annotations" / "png_shapes_val.json").read_text())
    noun = next(s for s in narratives[1]["segments"] if s["segment_ids"])
    plain = next(s for s in narratives[2]["segments"] if not s["noun"] and s["utterance"].strip())
    noun["utterance"], plain["utterance"] = "zebra", "qqq xyz"
    narratives[0]["segments"].append(
        {"utterance": " ", "segment_ids": [], "plural": False, "noun": False}
    )
    path = tmp_path / "png.json"
    path.write_text(json.dumps(narratives))
    return path, narratives


def test_what_does_not_align_is_counted_and_listed(damaged):
    path, narratives = damaged
    report = alignment_report(path)
    said = [s for n in narratives for s in n["segments"] if s["utterance"].strip()]
    assert report["narratives"] == 4 and report["utterances"] == len(said)
    assert report["aligned"] == len(said) - 2
    assert report["nouns"] == sum(bool(s["noun"] or s["segment_ids"]) for s in said)
    assert report["aligned_nouns"] == report["nouns"] - 1
    assert [
        (u["narrative"], u["image_id"], u["utterance"], u["is_noun"]) for u in report["unaligned"]
    ] == [
        (1, narratives[1]["image_id"], "zebra", True),
        (2, narratives[2]["image_id"], "qqq xyz", False),
    ]
    assert report["unaligned"][0]["caption"] == narratives[1]["caption"]


def test_the_command_line(root, damaged, tmp_path, capsys):
    main = script("prepare_png").main
    path, narratives = damaged
    out = tmp_path / "spans.json"
    assert main(["--check", str(path), "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "'zebra'" in printed and f"image {narratives[1]['image_id']}" in printed
    assert json.loads(out.read_text())["unaligned"][1]["utterance"] == "qqq xyz"
    assert main(["--check", str(path), "--allow", "1"]) == 1
    assert main(["--check", str(path), "--allow", "2"]) == 0
    notes = root / "annotations"
    where = (root / "val", notes / "panoptic_val", notes / "panoptic_val.json")
    with registered(datasets.register_png, *where, notes / "png_shapes_val.json") as name:
        capsys.readouterr()
        assert main(["--check", name]) == 0
        assert f"next: python datasets/check.py {name}" in capsys.readouterr().out
    with registered(datasets.register_panoptic, *where) as name:
        refused(main, name, "holds no narratives", capsys)
    refused(main, "gella_nothing", "gella_coco_png_val2017", capsys)
    refused(main, str(tmp_path / "absent.json"), "does not exist", capsys)
    path.write_text("[{]")
    refused(main, str(path), "not a JSON file", capsys)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def refused(main, name, message, capsys):
    capsys.readouterr()
    assert main(["--check", name]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason="shared/coco_sample is absent")
def test_real_narratives_align():
    report = alignment_report(COCO_SAMPLE / "png_coco_val2017.json")
    assert report["narratives"] == 4 and report["unaligned"] == [] and report["utterances"] == 44


CAPTION = "There isn't a dog, (a cat) and the man's red-brown hat ."


@pytest.mark.parametrize(
    "utterances",
    [
        ["there is", "n't", "a dog", ",", "( a cat )", "and", "the man", "'s", "red - brown hat."],
        # the caption has signs that no utterance has
        ["there is", "n't", "a dog", "a cat", "and", "the man", "'s", "red brown hat"],
        # an utterance has signs that the caption has not
        ["there is", "n't", "a dog ;", "a cat", "and", '" the man', "'s", "red brown hat", "!"],
    ],
)  # fmt: skip
def test_only_case_spaces_and_signs_differ(utterances):
    """The k-th letter is the k-th letter, whatever stands between."""
    found = align_utterances(CAPTION, utterances)
    letters = [i for i, c in enumerate(CAPTION) if c.isalnum()]
    cursor = 0
    for words, span in zip(utterances, found):
        count = sum(c.isalnum() for c in words)
        if not count:
            continue
        own = letters[cursor : cursor + count]
        cursor += count
        assert span is not None and [i for i in letters if span[0] <= i < span[1]] == own
    assert cursor == len(letters)
