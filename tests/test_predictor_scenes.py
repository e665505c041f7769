"""Questions about scenes that were encoded once, against the evaluation's whole passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predictor_results import as_evaluated, same_answers
from tiny_gella import (
    CATEGORIES,
    NOUNS,
    QUERIES,
    TOLERANCE,
    farthest,
    make_cfg,
    make_mapper,
    make_model,
    make_record,
    same_result,
)

from gella.predictor import GellaPredictor, Scene
from gella.predictor.questions import TASKS, caption_question, prefix_ids
from gella.text import prompts

# (height, width), number of entities, number of nouns
SCENES = [((60, 80), 5, 2), ((90, 60), 9, 5), ((48, 48), 1, 1), ((64, 96), 14, 7)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("scenes")
    return [
        make_record(folder, f"scene{i}", size, entities, NOUNS[:nouns], seed=i)
        for i, (size, entities, nouns) in enumerate(SCENES)
    ]


def encode(predictor: GellaPredictor, record: dict[str, Any]) -> Scene:
    return predictor.encode(
        record["file_name"],
        record["entities"]["file_name"],
        segments_info=record["entities"]["segments_info"],
    )


def answer(predictor: GellaPredictor, task: str, record: dict[str, Any], scene: Scene) -> Any:
    if task == "ground":
        return predictor.ground_phrases(record["caption"], record["phrases"], scene=scene)
    if task == "panoptic":
        return predictor.panoptic(CATEGORIES, scene=scene)
    if task == "refer":
        return predictor.refer(record["expressions"][0]["text"], scene=scene)
    if task == "describe":
        return predictor.describe(scene=scene)
    return predictor.extract_nouns(record["caption"], scene=scene)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("snap", [True, False])
def test_every_answer_is_that_of_evaluation(
    records: list, tokenizer_dir: Path, queries: str, snap: bool
) -> None:
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.GELLA.SNAP", snap, "MODEL.GELLA.SNAP_IOU", 0.1)
    model = make_model(cfg)
    predictor, mapper = GellaPredictor(cfg, model=model), make_mapper(cfg, is_train=False)
    texts: list[str] = []
    for record in records:
        scene = encode(predictor, record)
        for task in TASKS:
            (evaluated,) = model([mapper(record, task=task)])
            found = answer(predictor, task, record, scene)
            if task in ("ground", "refer"):
                assert len(found.phrases) == len(evaluated["grounding"]) > 0
                same_result({"grounding": evaluated["grounding"]}, as_evaluated(found))
            elif task == "panoptic":
                assert evaluated["panoptic_seg"][1]
                same_result({"panoptic_seg": evaluated["panoptic_seg"]}, as_evaluated(found))
            elif task == "describe":
                assert found == evaluated["text"].strip()
                texts.append(found)
            else:
                assert found == prompts.parse_nouns(evaluated["text"])
    assert len(set(texts)) > 1


@pytest.fixture(scope="module")
def predictor(tokenizer_dir: Path) -> GellaPredictor:
    cfg = make_cfg(tokenizer_dir)
    return GellaPredictor(cfg, model=make_model(cfg))


def test_the_order_of_questions_does_not_matter(records: list, predictor: GellaPredictor) -> None:
    fresh = {
        task: answer(predictor, task, records[1], encode(predictor, records[1])) for task in TASKS
    }
    scene = encode(predictor, records[1])
    encode(predictor, records[0])  # another one in between changes nothing
    for task in [*TASKS, *reversed(TASKS), "ground", "ground"]:
        same_answers(fresh[task], answer(predictor, task, records[1], scene))


class Counts:
    """Calls of the vision side, and positions that the language model computed."""

    def __init__(self, model: Any) -> None:
        self.vision, self.language = 0, []
        for part in (model.image_encoder, model.colormap_encoder, model.mask_decoder):
            part.register_forward_hook(self._vision)
        model.language_decoder.llama.base_model.register_forward_hook(self._language)

    def _vision(self, *args: Any) -> None:
        self.vision += 1

    def _language(self, module: Any, args: Any, output: Any) -> None:
        self.language.append(output.last_hidden_state.shape[1])


def test_vision_and_image_tokens_are_computed_once(records: list, tokenizer_dir: Path) -> None:
    cfg = make_cfg(tokenizer_dir)
    model = make_model(cfg)
    predictor, counts = GellaPredictor(cfg, model=model), Counts(model)
    scene = encode(predictor, records[1])
    start = len(prefix_ids(cfg, predictor.tokenizer))
    assert counts.vision == 3 and counts.language == [start] and start > 36
    for task in TASKS * 2:
        answer(predictor, task, records[1], scene)
    assert counts.vision == 3 and counts.language.count(start) == 1
    whole = make_mapper(cfg, is_train=False)(records[1], task="ground")["input_ids"]
    assert counts.language[1] == len(whole) - start


@pytest.mark.parametrize("system", ["", "A chat. \n\nAnswer well! "])
def test_the_shared_start_is_that_of_every_prompt(
    records: list, tokenizer_dir: Path, system: str
) -> None:
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.LANGUAGE.SYSTEM", system)
    mapper = make_mapper(cfg, is_train=False)
    start = prefix_ids(cfg, mapper.tokenizer).tolist()
    assert start[-36:] == [prompts.IMAGE_TOKEN_ID] * 36
    for record in (records[0], {**records[1], "caption": "\n\n  A  " + records[1]["caption"]}):
        for task in ("describe", "extract", "panoptic", "refer"):
            ids = mapper({**record, "phrases": records[0]["phrases"]}, task=task)["input_ids"]
            assert ids[: len(start)].tolist() == start
            assert prompts.IMAGE_TOKEN_ID not in ids[len(start) :]


# -- generated nouns -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fluent(records: list, tokenizer_dir: Path) -> GellaPredictor:
    """A predictor whose language decoder knows the nouns of the first two records' captions."""
    options = ("MODEL.LANGUAGE.NUM_LAYERS", 2, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 90)
    cfg = make_cfg(tokenizer_dir, "entity", *options)
    model = make_model(cfg)
    predictor = GellaPredictor(cfg, model=model)
    batch = [
        predictor._engine.ask(
            caption_question(record["caption"], [p["text"] for p in record["phrases"]]),
            encode(predictor, record),
        ).inputs
        for record in records[:2]
    ]
    with torch.no_grad():
        grid = model.encode(batch)[1]
    optimizer = torch.optim.AdamW(model.language_decoder.parameters(), 4e-3)
    for _ in range(150):
        loss = model.read_answers(batch, grid).loss_answer
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.language_decoder.parameters(), 1.0)
        optimizer.step()
        if loss < 0.02:
            break
    return predictor


@pytest.mark.parametrize("place", [0, 1])
def test_nouns_are_extracted_and_grounded_on_one_scene(
    records: list, fluent: GellaPredictor, place: int
) -> None:
    record, nouns = records[place], list(NOUNS[: SCENES[place][2]])
    scene, counts, seen = encode(fluent, record), Counts(fluent.model), []
    assert fluent.extract_nouns(record["caption"], scene=scene, on_text=seen.append) == nouns
    assert len(seen) > 1 and seen[-1] == prompts.noun_answer(nouns)
    assert all(later.startswith(text) for text, later in zip(seen, seen[1:]))
    plain = fluent.ground(record["caption"], nouns, scene=scene)
    passes = len(counts.language)
    same_answers(plain, fluent.ground(record["caption"], scene=scene))
    assert counts.vision == 0
    # One pass more than the extraction: the answer's.
    assert len(counts.language) - passes == passes
    # Undrafted, the answer is the same.
    lookup, fluent.model.language_decoder.prompt_lookup_tokens = (
        fluent.model.language_decoder.prompt_lookup_tokens,
        0,
    )
    assert fluent.extract_nouns(record["caption"], scene=scene) == nouns
    fluent.model.language_decoder.prompt_lookup_tokens = lookup


def test_a_description_is_streamed(records: list, predictor: GellaPredictor) -> None:
    seen: list[str] = []
    scene = encode(predictor, records[0])
    text = predictor.describe(scene=scene, on_text=seen.append)
    assert len(seen) > 3 and seen[-1].strip() == text.rstrip("\ufffd") != seen[0]

    def stop(text: str) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError):  # whoever listens may end it
        predictor.describe(scene=scene, on_text=stop)
    assert predictor.describe(scene=scene) == text


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", QUERIES)
def test_threads_share_a_predictor(records: list, tokenizer_dir: Path, queries: str) -> None:
    cfg = make_cfg(tokenizer_dir, queries)
    predictor = GellaPredictor(cfg, model=make_model(cfg))
    jobs = [(task, record) for record in records for task in TASKS]
    serial = [answer(predictor, task, r, encode(predictor, r)) for task, r in jobs]
    shared = {r["image_id"]: encode(predictor, r) for r in records}
    fresh = GellaPredictor(cfg, model=predictor.model)  # nothing is loaded yet
    barrier = threading.Barrier(8)

    def work(job: tuple[int, tuple[str, dict]]) -> Any:
        number, (task, record) = job
        if number < 8:
            barrier.wait(60)
        own = number % 2 == 0
        return answer(
            fresh, task, record, encode(fresh, record) if own else shared[record["image_id"]]
        )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, enumerate(jobs * 2)))
    for expected, result in zip(serial * 2, found, strict=True):
        same_answers(expected, result)


def test_each_thread_has_its_own_picture(records: list, predictor: GellaPredictor) -> None:
    def in_a_thread(function: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    first = encode(predictor, records[0])
    given = records[1]["file_name"], records[1]["entities"]["file_name"]
    second = predictor.set_image(*given)
    assert predictor.refer("x").image is second.image
    assert predictor.refer("x", scene=first).image is first.image
    assert predictor.refer("x").image is second.image  # naming one changes nothing
    with pytest.raises(RuntimeError, match="set_image"):
        in_a_thread(lambda: predictor.refer("x"))
    other = in_a_thread(lambda: (predictor.set_image(*given), predictor.refer("x"))[1])
    assert other.image is not second.image and predictor.refer("x").image is second.image


# -- other weights ---------------------------------------------------------------------------------


def test_bfloat16_keeps_language_weights_small_and_answers_near(
    records: list, tokenizer_dir: Path, tmp_path: Path
) -> None:
    cfg = make_cfg(tokenizer_dir)
    model = make_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    given = (tmp_path / "config.yaml", str(tmp_path / "weights.pth"))
    exact = GellaPredictor.from_config(*given, dtype="float32")
    rough = GellaPredictor.from_config(*given, dtype="bfloat16")
    kinds = {p.dtype for p in rough.model.language_decoder.parameters()}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    mapper = make_mapper(rough.cfg, is_train=False)
    for record in records[:2]:
        scene = encode(rough, record)
        same_place = [p.dtype for pair in scene.encoded.prefix.keys_values for p in pair]
        assert set(same_place) == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            (evaluated,) = rough.model([mapper(record, task="ground")])
        found = answer(rough, "ground", record, scene)
        reference = answer(exact, "ground", record, encode(exact, record))
        for a, b, c in zip(evaluated["grounding"], found.phrases, reference.phrases, strict=True):
            assert farthest(a["scores"][0], b["scores"][0]) < 0.02
            assert farthest(c["scores"][0], b["scores"][0]) < 0.05
        assert farthest(found.phrases[0]["scores"][0], reference.phrases[0]["scores"][0]) > 0
        assert answer(rough, "panoptic", record, scene).segments_info
        assert isinstance(rough.describe(scene=scene), str)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_answer_as_in_evaluation(records: list, tokenizer_dir: Path, merged: bool) -> None:
    pytest.importorskip("peft")
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.LANGUAGE.LORA.ENABLED", True)
    model = make_model(cfg)
    if merged:
        model.language_decoder.merge_adapters()
    _equal_to_evaluation(cfg, model, records[0])


def test_quantised_weights_answer_as_in_evaluation(records: list, tokenizer_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.LANGUAGE.QUANTIZATION", "8bit")
    _equal_to_evaluation(cfg, make_model(cfg), records[0])


def _equal_to_evaluation(cfg: Any, model: Any, record: dict[str, Any]) -> None:
    predictor, mapper = GellaPredictor(cfg, model=model), make_mapper(cfg, is_train=False)
    scene = encode(predictor, record)
    (evaluated,) = model([mapper(record, task="ground")])
    found = answer(predictor, "ground", record, scene)
    for a, b in zip(evaluated["grounding"], found.phrases, strict=True):
        assert a["entity_ids"] == b["entity_ids"]
        assert farthest(a["scores"], b["scores"]) < (TOLERANCE if not _rounded(cfg) else 0.02)
        assert np.array_equal(a["mask"], b["mask"])
    assert predictor.describe(scene=scene) == model([mapper(record, task="describe")])[0]["text"]


def _rounded(cfg: Any) -> bool:
    return bool(cfg.MODEL.LANGUAGE.QUANTIZATION)
