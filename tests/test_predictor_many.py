"""Many requests in shared passes: equal to single calls, failures in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predictor_results import same_answers
from tiny_gella import CATEGORIES, NOUNS, QUERIES, make_caption, make_cfg, make_entities, make_model

from gella.entities.entity_map import EntityMap
from gella.predictor import GellaPredictor, Request
from gella.text import prompts

SIZES = [(60, 80), (90, 60), (48, 48), (64, 96), (50, 50)]


@pytest.fixture(scope="module", params=QUERIES)
def predictor(request: pytest.FixtureRequest, tokenizer_dir: Path) -> GellaPredictor:
    cfg = make_cfg(tokenizer_dir, request.param)
    return GellaPredictor(cfg, model=make_model(cfg))


@pytest.fixture(scope="module")
def pictures() -> list[tuple[np.ndarray, EntityMap]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (*size, 3), dtype=np.uint8), make_entities(*size, 2 + 3 * i, i))
        for i, size in enumerate(SIZES)
    ]


def requests_about(pictures: list) -> list[Request]:
    """Ground, refer, panoptic, describe and extract, on each picture in another order."""
    asked = []
    for i, picture in enumerate(pictures):
        nouns = NOUNS[: 1 + i]
        caption = make_caption(nouns)[0]
        kinds = [
            Request("ground", *picture, text=caption, nouns=nouns, image_id=i),
            Request("refer", *picture, text=nouns[0], image_id=i),
            Request("panoptic", *picture, categories=CATEGORIES, image_id=i),
            Request("describe", *picture, image_id=i),
            Request("extract", *picture, text=caption, image_id=i),
        ]
        asked += kinds[i:] + kinds[:i]
    return asked


def single(predictor: GellaPredictor, request: Request) -> Any:
    scene = predictor.encode(request.image, request.entities, image_id=request.image_id)
    if request.task == "ground":
        return predictor.ground(request.text, request.nouns, scene=scene)
    if request.task == "refer":
        return predictor.refer(request.text, scene=scene)
    if request.task == "panoptic":
        return predictor.panoptic(request.categories or [], scene=scene)
    if request.task == "describe":
        return predictor.describe(scene=scene)
    return predictor.extract_nouns(request.text, scene=scene)


def test_results_are_those_of_single_calls(predictor: GellaPredictor, pictures: list) -> None:
    requests = requests_about(pictures)
    singles = [single(predictor, request) for request in requests]
    for batch_size in (1, 4, 7, 99):
        progress: list[int] = []
        results = predictor.predict_many(
            requests, batch_size=batch_size, progress=lambda *n, to=progress: to.extend(n)
        )
        assert len(results) == len(requests) == 25
        for expected, result in zip(singles, results, strict=True):
            same_answers(expected, result)
        steps = [*range(batch_size, 25, batch_size), 25]
        assert progress == [number for done in steps for number in (done, 25)]


class Passes:
    """Images and prompts per pass, through the model's own methods."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[int] = []
        self.prompts: list[int] = []
        decoder = model.language_decoder
        encode, generate, read_answers = model.encode, decoder.generate, model.read_answers

        def encoding(views: list) -> Any:
            self.images.append(len(views))
            return encode(views)

        def generating(grid: Any, inputs: list, **options: Any) -> Any:
            self.prompts.append(len(inputs))
            return generate(grid, inputs, **options)

        def reading(inputs: list, *args: Any) -> Any:
            self.prompts.append(len(inputs))
            return read_answers(inputs, *args)

        monkeypatch.setattr(model, "encode", encoding)
        monkeypatch.setattr(decoder, "generate", generating)
        monkeypatch.setattr(model, "read_answers", reading)


def test_a_picture_is_encoded_once_and_passes_are_shared(
    predictor: GellaPredictor, pictures: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(predictor.model, monkeypatch)
    predictor.predict_many(requests_about(pictures), batch_size=99)
    assert passes.images == [5] and passes.prompts == [5, 5, 15]
    passes.images.clear()
    # In batches a picture that comes again later is still known; unless it is another object.
    requests = requests_about(pictures)
    predictor.predict_many(requests, batch_size=4)
    assert sum(passes.images) == 5
    passes.images.clear()
    copied = [replace(r, image=r.image.copy()) for r in requests[:3]]
    other_colours = [replace(requests[0], image_id="x")]
    predictor.predict_many([*requests[:3], *copied, *other_colours], batch_size=99)
    assert passes.images == [5]


def test_names_of_files_share_a_scene(
    predictor: GellaPredictor, pictures: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    image, entities = pictures[0]
    Image.fromarray(image).save(tmp_path / "12.png")
    Image.fromarray(entities.ids.astype(np.uint8)).save(tmp_path / "masks.png")
    passes = Passes(predictor.model, monkeypatch)
    paths = [(str(tmp_path / "12.png"), tmp_path / "masks.png")] * 2
    paths += [(tmp_path / "12.png", str(tmp_path / "masks.png"))]
    found = predictor.predict_many([Request("refer", *path, text="a lamp") for path in paths])
    assert passes.images == [1] and passes.prompts == [3]
    assert found[0].image is found[2].image  # type: ignore[union-attr]
    plain = predictor.refer("a lamp", scene=predictor.encode(*paths[0]))
    same_answers(plain, found[1])


def test_a_bad_request_stops_no_other(
    predictor: GellaPredictor, pictures: list, tmp_path: Path
) -> None:
    picture, missing = pictures[1], tmp_path / "missing.png"
    caption, nouns = make_caption(NOUNS[:2])[0], NOUNS[:2]
    good = Request("ground", *picture, text=caption, nouns=nouns)
    requests = [
        good,
        Request("ground", missing, picture[1], text=caption, nouns=nouns),
        Request("ground", missing, picture[1], text=caption, nouns=nouns),
        Request("ground", picture[0], missing, text=caption, nouns=nouns),
        Request("ground", picture[0][:9], picture[1], text=caption, nouns=nouns),
        Request("ground", *picture, text=" ", nouns=nouns),
        Request("ground", *picture, text=caption, nouns=[]),
        Request("ground", *picture, text="long " * 3000, nouns=["long"]),
        Request("panoptic", *picture),
        Request("paint", *picture),
        Request("extract", *picture),
        Request("ground", *picture, text=caption),  # of which an untrained model extracts nothing
        Request("refer", *picture, text="<SEG>"),
        good,
    ]
    messages = [
        None,
        "missing.png",
        "missing.png",
        "missing.png",
        "60x90",
        "caption is empty",
        "caption without nouns",
        "tokens",
        "no category",
        "unknown task 'paint'; known: ground, refer",
        "caption is empty",
        "caption without nouns",
        "<SEG>",
        None,
    ]
    for batch_size in (3, 99):
        results = predictor.predict_many(requests, batch_size=batch_size)
        for message, result in zip(messages, results, strict=True):
            if message is None:
                same_answers(single(predictor, good), result)
            else:
                assert isinstance(result, (ValueError, FileNotFoundError)), result
                assert message in str(result)


def test_a_pass_that_fails_is_tried_one_by_one(
    predictor: GellaPredictor, pictures: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_about(pictures)
    expected = predictor.predict_many(requests, batch_size=99)
    for name in ("encode_images", "write_answers", "find_entities"):
        whole = getattr(predictor.model, name)

        def small(items: list, *args: Any, whole: Any = whole) -> Any:
            if len(items) > 1:
                raise RuntimeError("out of memory")
            return whole(items, *args)

        monkeypatch.setattr(predictor.model, name, small)
    for one, other in zip(expected, predictor.predict_many(requests, batch_size=99), strict=True):
        same_answers(one, other)
    monkeypatch.setattr(predictor.model, "encode_images", _out_of_memory)
    results = predictor.predict_many(requests[:3])
    assert [str(result) for result in results] == ["out of memory"] * 3


def _out_of_memory(*args: Any) -> Any:
    raise RuntimeError("out of memory")


def test_extracted_nouns_are_grounded_in_one_pass_with_the_given_ones(
    predictor: GellaPredictor, pictures: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption, nouns = make_caption(NOUNS[:3])[0], list(NOUNS[:3])
    text = prompts.noun_answer([*nouns[:2], "a unicorn", nouns[2]])
    monkeypatch.setattr(
        predictor.model, "write_answers", lambda inputs, *args: [{"text": text}] * len(inputs)
    )
    passes = Passes(predictor.model, monkeypatch)
    requests = [Request("ground", *pictures[i], text=caption, image_id=i) for i in (0, 1)]
    requests += [replace(requests[0], nouns=nouns), replace(requests[0], task="extract")]
    found: Any = predictor.predict_many(requests)
    assert passes.prompts == [3]
    assert [len(grounding.phrases) for grounding in found[:3]] == [3, 3, 3]
    same_answers(found[0], found[2])
    assert found[3] == prompts.parse_nouns(text)


def test_nothing_to_do_and_a_wrong_batch_size(predictor: GellaPredictor) -> None:
    assert predictor.predict_many([]) == []
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        predictor.predict_many([], batch_size=0)
