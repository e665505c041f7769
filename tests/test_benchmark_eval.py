"""The benchmark of evaluation, and what makes evaluation quick: it measures what it says."""

from __future__ import annotations

import json

import benchmark
import evaluation as benchmark_eval
import nouns as benchmark_nouns
import numpy as np
import pytest
import scoring as benchmark_scoring
import torch
from PIL import Image

from gella.data.coco_categories import coco_panoptic_categories
from gella.entities.entity_map import id_to_rgb
from gella.entities.files import read_id_png
from gella.evaluation.panoptic_quality import PQCounts

TINY = "--grid 2 --layers 1 --width 64 --vocabulary 700 --nouns 3 --repeat 1 --recall-nouns 500"
SMALL = ["eval", "--images", "2", "--size", "64x48", "--segments", "6", *TINY.split()]
CATEGORIES = coco_panoptic_categories()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Made scenes with their predictions on disk."""
    return benchmark_scoring.made_pairs(tmp_path_factory.mktemp("pairs"), 6, (64, 48), 12)


def test_it_runs_prints_a_verdict_per_aim_and_writes_json(tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert benchmark.main([*SMALL, "--json", str(path)]) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert len(figures["rules"]) == 5
    for rule in figures["rules"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[rule["met"]]
        assert f"{rule['name']}: " in text
        assert f"<= {rule['limit']:g}, {met})" in text or f">= {rule['limit']:g}, {met})" in text
    assert figures["nouns"]["nouns"] == 3 and figures["panoptic"]["images"] == 2
    assert "next: python tools/train_net.py" in text


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, [True] * 5),
        ({"decodings": 1.51}, [False, True, True, True, True]),
        ({"count_faster": 1.49}, [True, False, True, True, True]),
        ({"total_faster": None}, [True, True, None, True, True]),
        ({"official": 1.01}, [True, True, True, False, True]),
        ({"times_faster": 5.9}, [True, True, True, True, False]),
    ],
)
def test_aims_are_judged_on_their_side_of_the_limit(change, met):
    panoptic = {"decodings": 1.5, "count_faster": 1.5, "total_faster": 1.5}
    recall = {"hard": 0.1, "official": 0.2, "flmm": 0.3}
    nouns = {"times_faster": 6.0, "nouns": 12}
    for part in (panoptic, recall, nouns):
        part.update({key: value for key, value in change.items() if key in part})
    figures = {"panoptic": panoptic, "recall_s": recall, "recall_nouns": 100_000, "nouns": nouns}
    assert [rule["met"] for rule in benchmark_eval.rules(figures)] == met


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "--width is 100; give a multiple of 64"),
        (["--recall-nouns", "0"], "--recall-nouns is 0"),
        (["--size", "7"], "--size"),
        (["--panoptic-json", "absent.json"], "absent.json"),
        (["--panoptic-json", __file__], "no COCO panoptic file"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert benchmark.main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_made_predictions_are_right_wrong_and_missing(pairs):
    """So that all branches of the counting are among what is timed."""
    counts = [benchmark_scoring.count(p, benchmark_scoring.decode(p), CATEGORIES) for p in pairs]
    for name in ("tp", "fp", "fn"):
        assert sum(sum(getattr(c, name).values()) for c in counts) > 2, name
    assert all(len(p.prediction["segments_info"]) <= len(p.truth["segments_info"]) for p in pairs)


def test_real_annotations_are_scored_too(coco_sample, tmp_path):
    path = coco_sample / "annotations" / "panoptic_val2017.json"
    found = benchmark_scoring.pairs_of(path, tmp_path, 5)
    assert [p.truth["image_id"] for p in found] == [p.prediction["image_id"] for p in found]
    for pair in found:
        truth, prediction = benchmark_scoring.decode(pair)
        assert truth.shape == prediction.shape and (truth != prediction).any()
        counts = benchmark_scoring.count(pair, (truth, prediction), CATEGORIES)
        assert sum(counts.tp.values()) > 5


def test_panopticapi_counts_the_same_with_files_and_without(pairs):
    pytest.importorskip("panopticapi", reason="panopticapi is not on PyPI; put it on PYTHONPATH")
    reference = benchmark_scoring.Reference(CATEGORIES)
    for pair in pairs:
        ids = benchmark_scoring.decode(pair)
        ours = benchmark_scoring.count(pair, ids, CATEGORIES)
        pixels = benchmark_scoring._pixels(pair, ids)
        for theirs in (reference.from_files(pair), reference.decoded((pair, pixels))):
            benchmark_scoring.check_agreement(ours, theirs, pair)
    figures = benchmark_scoring.compare_panoptic(pairs, 1)
    assert figures["count_faster"] == figures["reference_count_ms"] / figures["count_ms"]
    assert figures["total_faster"] == figures["reference_total_ms"] / figures["total_ms"]


def test_counts_that_differ_are_refused(pairs):
    class Statistics(dict):
        def __missing__(self, key):
            return type("Category", (), {"tp": 0, "fp": 0, "fn": 0, "iou": 0.0})

    category = type("Category", (), {"tp": 1, "fp": 0, "fn": 2, "iou": 0.75})
    ours = PQCounts(iou={3: 0.75}, tp={3: 1}, fn={3: 2})
    benchmark_scoring.check_agreement(ours, Statistics({3: category}), pairs[0])
    for wrong in (PQCounts(iou={3: 0.75}, tp={3: 1}), PQCounts(iou={3: 0.7}, tp={3: 1}, fn={3: 2})):
        with pytest.raises(RuntimeError, match="category 3"):
            benchmark_scoring.check_agreement(wrong, Statistics({3: category}), pairs[0])
    with pytest.raises(RuntimeError, match="category 3"):
        benchmark_scoring.check_agreement(PQCounts(), Statistics({3: category}), pairs[0])


def test_tasks_take_turns_and_the_first_pass_is_not_counted(monkeypatch):
    # Seconds of the calls in turn: a first pass of 90, then 1 and 2 (a), 10 and 40 (b), and so on.
    seconds = iter([90] * 4 + [1, 10, 2, 40] + [3, 20, 6, 30])
    now = [0.0, False]

    def clock() -> float:
        now[1] = not now[1]
        now[0] += 0 if now[1] else next(seconds)
        return now[0]

    monkeypatch.setattr(benchmark_scoring.time, "thread_time", clock)
    seen: list[tuple[str, int]] = []
    tasks = {name: (lambda x, name=name: seen.append((name, x)), [1, 2]) for name in "ab"}
    figures = benchmark_scoring.take_turns(tasks, 2)
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 3
    assert figures == {"a": 2500.0, "b": 25_000.0}


def test_one_pass_and_a_pass_per_noun_ask_for_the_same_nouns(tokenizer):
    together, single = benchmark_nouns.prompts_of(tokenizer, 20, 9)
    assert len(together.seg_positions) == len(single) == 20
    assert all(len(prompt.seg_positions) == 1 for prompt in single)
    caption, names = benchmark_nouns.made_caption(20)
    assert len(set(names)) == 20 and all(f"a {name}" in caption for name in names)
    # The caption stands in all of them, so all but the answers agree.
    start = int((together.labels != -100).nonzero()[0])
    for prompt in single:
        assert torch.equal(prompt.input_ids[:start], together.input_ids[:start])


def test_a_language_model_of_the_aim_s_size_by_default():
    from argparse import ArgumentParser

    parser = ArgumentParser()
    benchmark_eval.add_arguments(parser)
    args = parser.parse_args([])
    with torch.device("meta"):
        decoder = benchmark_nouns.random_decoder(args.layers, args.width, args.vocabulary)
    assert 95e6 < sum(p.numel() for p in decoder.llama.parameters()) < 115e6
    assert (args.nouns, args.grid, args.recall_nouns) == (12, 24, 100_000)


# -- reading ids -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "rgba", "grey8", "grey16", "palette", "interlaced"])
def test_ids_are_read_from_every_kind_of_png(tmp_path, kind):
    ids = np.random.default_rng(0).integers(0, 1 << 24, (13, 17)).astype(np.int32)
    path = tmp_path / "x.png"
    if kind == "rgb":
        Image.fromarray(id_to_rgb(ids)).save(path)
    elif kind == "rgba":
        Image.fromarray(id_to_rgb(ids)).convert("RGBA").save(path)
    elif kind == "grey8":
        ids %= 256
        Image.fromarray(ids.astype(np.uint8)).save(path)
    elif kind == "grey16":
        ids %= 65536
        Image.fromarray(ids.astype(np.uint16)).save(path)
    elif kind == "palette":
        ids %= 256
        picture = Image.fromarray(ids.astype(np.uint8), mode="L").copy()
        picture.putpalette(list(range(255, -1, -1)) * 3)
        picture.save(path)
    else:
        ids = _interlaced(path)
    read = read_id_png(path)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)


def _interlaced(path) -> np.ndarray:
    """An Adam7 RGB file of one pixel's height, which Pillow does not write; its ids."""
    import struct
    import zlib

    pixels = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], np.uint8)  # passes 1, 6 and 4
    passes = [pixels[:, 0::8], pixels[:, 2::4], pixels[:, 1::2]]
    raw = b"".join(b"\0" + part.tobytes() for part in passes)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 3, 1, 8, 2, 0, 0, 1)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    r, g, b = pixels.astype(np.int32).transpose(2, 0, 1)
    return r + 256 * g + 65536 * b


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        path
    )
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"no picture", whole[:20]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged|no picture"):
            read_id_png(path)
    with pytest.raises(FileNotFoundError):
        read_id_png(tmp_path / "absent.png")
