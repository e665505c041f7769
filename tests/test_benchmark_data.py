"""The benchmark of the data path: its ways agree, it measures what it says, errors are clear."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark
import data as benchmark_data
import numpy as np
import pytest
import scenes as benchmark_scenes
import torch
from PIL import Image

from gella.entities.sources import load_from_record

SMALL = ["--size", "64x48", "--images", "2", "--segments", "5", "--repeat", "1", "--seconds", "0"]
PIXELS = ["INPUT.GELLA.COLORMAP_SIZE", "96", "MODEL.IMAGE_ENCODER.IMAGE_SIZE", "56"]


@pytest.mark.parametrize("side", [37, 64, 90])
def test_all_ways_give_what_a_loop_over_pixels_gives(side):
    rng = np.random.default_rng(side)
    ids = benchmark_scenes.id_image(45, 64, 6, rng)
    ids[:9, :20] = 0
    segment_ids = [int(i) for i in np.unique(ids) if i]
    colors = rng.integers(1, 256, (len(segment_ids), 3), dtype=np.uint8)
    height, width = round(45 * side / 64), side
    expected = np.zeros((3, side, side), np.uint8)
    masks = np.zeros((len(segment_ids), side, side), bool)
    for y in range(height):
        for x in range(width):
            value = ids[int((y + 0.5) * 45 / height), int((x + 0.5) * 64 / width)]
            if value:
                masks[segment_ids.index(value), y, x] = True
                expected[:, y, x] = colors[segment_ids.index(value)]
    for name in ("by_runs", "plain"):
        colormap, targets = getattr(benchmark_data, name)(ids, segment_ids, colors, side)
        assert colormap.dtype == torch.uint8 and colormap.is_contiguous()
        np.testing.assert_array_equal(colormap.numpy(), expected, err_msg=name)
        assert targets.dtype == torch.bool
        np.testing.assert_array_equal(targets.numpy(), masks, err_msg=name)


def test_ways_that_disagree_are_not_timed(monkeypatch):
    maps = [benchmark_scenes.id_image(24, 32, 4, np.random.default_rng(0))]
    times = benchmark_data.compare_colormaps(maps, 32, 1)
    assert times["times_faster"] == pytest.approx(times["plain"] / times["ours"])
    right = benchmark_data.by_runs

    def wrong(*scene):
        colormap, masks = right(*scene)
        masks[0, 3, 4] ^= True
        return colormap, masks

    monkeypatch.setattr(benchmark_data, "by_runs", wrong)
    with pytest.raises(RuntimeError, match="different"):
        benchmark_data.compare_colormaps(maps, 32, 1)


def test_made_scenes_are_what_they_say(tmp_path):
    records, tokenizer = benchmark_scenes.write_scenes(tmp_path, 2, (80, 48), 7)
    assert Path(tokenizer, "tokenizer.json").is_file()
    for record in records:
        with Image.open(record["file_name"]) as picture:
            assert picture.size == (80, 48) and picture.format == "JPEG"
        entities = load_from_record(record)  # the reader checks ids against the annotation
        assert 5 <= entities.num_entities <= 7 and (entities.areas() > 0).all()
        assert not (entities.ids == 0).any()
        for phrase in record["phrases"]:
            assert record["caption"][phrase["start"] : phrase["end"]] == phrase["text"]
        named = [i for phrase in record["phrases"] for i in phrase["segment_ids"]]
        assert sorted(named) == sorted(entities.segment_ids)
    assert not np.array_equal(*(load_from_record(record).ids for record in records))


def test_a_small_run_measures_every_part_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_data, "STREAM", 3)
    file = tmp_path / "figures" / "data.json"
    threads = torch.get_num_threads()
    arguments = [*SMALL, "--workers", "0", "1", "--json", str(file), "--opts", *PIXELS]
    assert benchmark.main(["data", *arguments]) == 0
    assert torch.get_num_threads() == threads
    figures = json.loads(file.read_text())
    assert set(figures["stages_ms"]) == set(benchmark_data.STAGES)
    assert set(figures["loader_images_per_second"]) == {"0", "1"}
    assert set(figures["colormap_ms"]) == {"64", "96"}
    speeds = [figures["mapper_images_per_second"], *figures["loader_images_per_second"].values()]
    times = [time for part in figures["colormap_ms"].values() for time in part.values()]
    assert min(*speeds, *times) > 0
    assert len(figures["rules"]) == 2 + 1
    out = capsys.readouterr().out
    for text in (*benchmark_data.STAGES, "loader, 1 workers", "because:", str(file), "next:"):
        assert text in out


def test_what_is_asked_is_judged():
    figures = {
        "colormap_ms": {640: {"times_faster": 2.9}, 896: {"times_faster": 3.1}},
        "mapper_images_per_second": 100.0,
        "stages_ms": {"colormap": 0.6},
    }
    rules = benchmark_data.rules(figures)
    assert [rule["value"] for rule in rules] == pytest.approx([2.9, 3.1, 6.0])
    assert [rule["met"] for rule in rules] == [False, True, False]
    figures["stages_ms"]["colormap"] = 0.4
    assert benchmark_data.rules(figures)[-1]["met"]
