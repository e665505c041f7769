"""Prompts and answers, spans in captions, captions that are cut, and English words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gella import make_caption

from gella.text import prompts
from gella.text.prompts import (
    DESCRIBE_INSTRUCTIONS,
    EXTRACT_INSTRUCTIONS,
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    SEG_TOKEN,
    OverlongPrompt,
    build_prompt,
    decode_answer,
    fit_prompt,
    load_tokenizer,
    noun_answer,
    panoptic_answer,
    panoptic_sentence,
    parse_nouns,
    spoken_name,
    task_text,
)
from gella.text.spans import align_utterances, locate_phrases
from gella.text.words import bare_noun, in_a_row, names_several, number_in_words, other_numbers

# -- words -----------------------------------------------------------------------------------------


def test_numbers_in_words() -> None:
    known = {0: "zero", 11: "eleven", 20: "twenty", 21: "twenty one", 99: "ninety nine"}
    known |= {100: "one hundred", 119: "one hundred nineteen", 340: "three hundred forty"}
    known |= {999: "nine hundred ninety nine", 12001: "twelve thousand one"}
    assert {n: number_in_words(n) for n in known} == known
    # Reading back is a check of all of them.
    value = {number_in_words(n): n for n in [*range(20), *range(20, 100, 10)]}
    for n in range(1000):
        total = 0
        for word in number_in_words(n).split():
            total = total * 100 if word == "hundred" else total + value[word]
        assert total == n
    with pytest.raises(ValueError, match="-1"):
        number_in_words(-1)


NUMBERS = {
    True: "the dogs, two white circles, a man and a woman, a group of people, men on horses, 3 cups"
    ", a few, children",
    False: "a dog, a glass of water, the bus, grass, the man in shorts, the dog's tail, "
    "the wall with windows, ",
}


@pytest.mark.parametrize("several", NUMBERS)
def test_the_words_tell_whether_a_noun_names_several(several: bool) -> None:
    nouns = NUMBERS[several].split(", ")
    assert [noun for noun in nouns if names_several(noun) != several] == []


def test_determiners_plurals_and_lists() -> None:
    assert bare_noun("The  big Dog") == "big Dog" and bare_noun("all the") == "the"
    assert bare_noun("my other dogs") == "other dogs"
    assert bare_noun("all my 3 other dogs", counts=True) == "dogs"
    assert other_numbers("a Woman") == ["a women"] and other_numbers("leaves") == ["leaf"]
    assert {"cherries", "cherrys"} <= set(other_numbers("cherry"))
    assert "red bus" in other_numbers("red buses") and "glas" not in other_numbers("glass")
    assert in_a_row(["a"]) == "a" and in_a_row(["a", "b", "c"]) == "a, b and c"


# -- answers ---------------------------------------------------------------------------------------


def test_answers_to_the_letter() -> None:
    for nouns, said in (
        (["a dog"], "is one semantic noun, including a dog <SEG>."),
        (["a dog", "the sky"], "are two semantic nouns, including a dog <SEG> and the sky <SEG>."),
        (["a", "b", "c"], "are three semantic nouns, including a <SEG>, b <SEG> and c <SEG>."),
    ):
        assert noun_answer(nouns) == f"There {said}"
    names = ["person", "dog", "orange", "unicycle", "window"]
    assert panoptic_answer(names) == (
        "There might exist a person <SEG>, a dog <SEG>, an orange <SEG>, a unicycle <SEG> and a "
        "window <SEG>."
    )
    assert panoptic_sentence(names) == panoptic_answer(names).replace(" <SEG>", "")


@pytest.mark.parametrize(
    "nouns",
    [
        ["a dog"],
        ["salt and pepper", "a black, white and red flag", "the sky"],
        ["the sky", "salt and pepper"],
        ["and so on", "and so on", "and so on"],
        ["a sign, including text", "it"],
        ["a man's hat", "10 % of it", "café", "犬"],
        ["the dog"] * 21,
    ],
)
def test_nouns_survive_the_round_trip(nouns: list[str]) -> None:
    assert parse_nouns(noun_answer(nouns)) == nouns


def test_parsing_forgives_what_models_write() -> None:
    loose = "There are two semantic nouns, including a dog<SEG>, and a cat<SEG>."
    assert parse_nouns(loose) == ["a dog", "a cat"]
    assert parse_nouns("a  dog <SEG> <SEG> and then nothing") == ["a dog", ""]
    assert parse_nouns("There is nothing.") == []
    assert parse_nouns(panoptic_answer(["dog", "cat"])) == ["a dog", "a cat"]


@pytest.mark.parametrize("nouns", [[], ["a dog", "  "], ["a <SEG>"], ["an <image>"]])
def test_answers_refuse_bad_nouns(nouns: list[str]) -> None:
    with pytest.raises(ValueError, match="noun"):
        noun_answer(nouns)


def test_spoken_names_of_coco_are_distinct(coco_sample: Path) -> None:
    text = (coco_sample / "annotations" / "panoptic_coco_categories.json").read_text()
    names = {category["name"]: spoken_name(category["name"]) for category in json.loads(text)}
    assert len(set(names.values())) == 133
    assert not any("-" in name or "merged" in name for name in names.values())
    known = {"wall-other-merged": "wall", "wall-brick": "wall brick", "teddy bear": "teddy bear"}
    assert names.items() >= {**known, "sky-other-merged": "sky"}.items()


# -- spans -----------------------------------------------------------------------------------------


def test_locating_walks_left_to_right() -> None:
    caption = "A dog and another Dog chase cats; a  cat sleeps."
    spans = locate_phrases(caption, ["dog", "dog", "unicorn", "a cat", "dog"])
    assert spans[2] is None and spans[4] is None
    assert [caption[s[0] : s[1]] for s in spans if s] == ["dog", "Dog", "a  cat"]
    assert spans[0] != spans[1]
    # A whole word further on is preferred over a part of a word.
    assert locate_phrases("category of a cat", ["cat"]) == [(14, 17)]
    assert locate_phrases("many cats", ["cat"]) == [(5, 8)]
    assert locate_phrases("a (b] c", ["(b]", ""]) == [(2, 5), None]


def test_alignment_of_the_sample_narratives(coco_sample: Path) -> None:
    path = coco_sample / "annotations" / "png_coco_val2017.json"
    records = json.loads(path.read_text())
    assert len(records) == 4
    for record in records:
        utterances = [segment["utterance"] for segment in record["segments"]]
        spans = align_utterances(record["caption"], utterances)
        end = 0
        for utterance, span in zip(utterances, spans):
            assert span is not None
            said = record["caption"][span[0] : span[1]]
            assert said.lower().replace(" ", "") == utterance.lower().replace(" ", "")
            assert not record["caption"][end : span[0]].strip()  # nothing lies between
            end = span[1]


def test_alignment_survives_other_spelling_and_reports_what_is_not_there() -> None:
    def aligned(caption: str, utterances: str | list[str]) -> list[str | None]:
        given = utterances.split("|") if isinstance(utterances, str) else utterances
        spans = align_utterances(caption, given)
        return [caption[span[0] : span[1]] if span else None for span in spans]

    caption = "There  isn't a  Dog's “bed”,\nand the dog's bed."
    said = ["There  is", "n't a", "Dog's", "“bed”", ",\nand the", "dog's", "bed", "."]
    assert aligned(caption, "there is|n't a|dog 's|\" bed \"|, and the|dog's|bed|.") == said
    caption = "In the park, a black dog runs. The sky is blue."
    said = ["In the park", "a black dog", "runs", None, None, "The sky", "is blue."]
    parts = "in the park|a black dog|runs|!|a purple xylophone|the sky|is blue ."
    assert aligned(caption, parts) == said
    assert aligned("", ["a", ""]) == [None, None]
    assert aligned("a dog", ["a dog", ""]) == ["a dog", None]


# -- token ids -------------------------------------------------------------------------------------


def test_labels_cover_the_answer_and_seg_positions_its_nouns(tokenizer: Any) -> None:
    nouns = ["the red circle", "a star", "the red circle"]
    instruction, answer = task_text("ground", "The red circle and a star.", nouns)
    options = {"num_image_tokens": 9, "system": "A chat.", "max_length": 400}
    prompt = build_prompt(tokenizer, instruction, answer, **options)
    question = build_prompt(tokenizer, instruction, None, **options)
    length = len(question.input_ids)
    for ids in (prompt.input_ids, prompt.labels, prompt.seg_positions):
        assert ids.dtype == torch.int64 and ids.ndim == 1
    # What generation starts from is what training conditions on.
    assert torch.equal(prompt.input_ids[:length], question.input_ids)
    assert (question.labels == IGNORE_INDEX).all() and len(question.seg_positions) == 0
    assert (prompt.labels[:length] == IGNORE_INDEX).all()
    assert torch.equal(prompt.labels[length:], prompt.input_ids[length:])
    assert prompt.input_ids[-1] == tokenizer.eos_token_id
    assert (prompt.input_ids == IMAGE_TOKEN_ID).sum() == 9
    assert tokenizer.decode(prompt.labels[length:-1]).strip().replace(" <SEG>", "<SEG>") == (
        answer.replace(" <SEG>", "<SEG>")
    )
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    assert len(prompt.seg_positions) == len(nouns)
    assert (prompt.input_ids[prompt.seg_positions] == seg_id).all()
    # Text before each <SEG> ends with its noun.
    for noun, position in zip(nouns, prompt.seg_positions.tolist()):
        before = tokenizer.decode(prompt.input_ids[length:position].tolist())
        assert before.endswith(noun)


def test_the_template_is_vicunas(tokenizer: Any) -> None:
    prompt = build_prompt(tokenizer, "Hi?", "Yes.", num_image_tokens=2, system="S.", max_length=99)
    ids = prompt.input_ids.tolist()
    first = ids.index(IMAGE_TOKEN_ID)
    assert ids[0] == tokenizer.bos_token_id and ids[first : first + 2] == [IMAGE_TOKEN_ID] * 2
    assert tokenizer.decode(ids[1:first]) == "S. USER: "
    assert tokenizer.decode(ids[first + 2 :]) == "\nHi? ASSISTANT: Yes.</s>"
    bare = build_prompt(tokenizer, "Hi?", None, num_image_tokens=0, system="", max_length=99)
    assert tokenizer.decode(bare.input_ids) == "<s>USER: \nHi? ASSISTANT:"


def test_decoding_a_generated_answer_gives_its_text_back(tokenizer: Any) -> None:
    answer = noun_answer(["a dog", "salt, and pepper", "café"])
    prompt = build_prompt(tokenizer, "?", answer, num_image_tokens=1, system="", max_length=200)
    ids = prompt.labels[prompt.labels != IGNORE_INDEX].tolist()
    assert decode_answer(tokenizer, ids + [tokenizer.pad_token_id] * 3) == answer


@pytest.mark.parametrize("text", ["a <SEG> b", "see <image>", "end</s>", "<s>", "<pad>"])
def test_the_templates_own_marks_are_refused_in_texts(tokenizer: Any, text: str) -> None:
    options = {"num_image_tokens": 1, "system": "", "max_length": 99}
    with pytest.raises(ValueError, match="holds"):
        build_prompt(tokenizer, text, None, **options)
    if SEG_TOKEN not in text:
        with pytest.raises(ValueError, match="answer holds"):
            build_prompt(tokenizer, "?", text, **options)


def test_too_long_a_prompt_names_both_numbers(tokenizer: Any) -> None:
    def build(answer: str | None, max_length: int) -> Any:
        options = {"num_image_tokens": 30, "system": "", "max_length": max_length}
        return build_prompt(tokenizer, "Hi", answer, **options).input_ids

    # Without an answer there must be room for one token of it.
    for answer, room, more in (("Ho", 0, ""), (None, 1, ", with one left")):
        length = len(build(answer, 999))
        build(answer, length + room)
        with pytest.raises(OverlongPrompt, match=rf"{length} tokens.*{length - 1} fit{more}"):
            build(answer, length + room - 1)


def test_texts_of_the_tasks() -> None:
    assert DESCRIBE_INSTRUCTIONS[0] == "Please help me describe the image."
    assert task_text("describe", "A {dog}. ", []) == (DESCRIBE_INSTRUCTIONS[0], "A {dog}.")
    question, answer = task_text("extract", "A {dog}.", ["A {dog}"])
    assert question == (
        "Please help me extract each semantic noun of the sentence. The sentence is A {dog}."
    )
    assert answer == noun_answer(["A {dog}"])
    assert task_text("ground", "A dog", ["A dog"], 1 + len(EXTRACT_INSTRUCTIONS))[0] == (
        EXTRACT_INSTRUCTIONS[1].format(caption="A dog")
    )
    assert task_text("refer", "left man", [])[1] == noun_answer(["left man"])
    question, answer = task_text("panoptic", "", ["dog", "cat"])
    assert question.endswith("There might exist a dog and a cat.")
    assert answer == panoptic_answer(["dog", "cat"])
    asked = [("describe", "", ()), ("extract", " A dog ", ()), ("panoptic", "", ["dog", "cat"])]
    assert [task_text(*texts, 5, answered=False) for texts in asked] == [
        (DESCRIBE_INSTRUCTIONS[1], None),
        (EXTRACT_INSTRUCTIONS[1].format(caption="A dog"), None),
        (EXTRACT_INSTRUCTIONS[1].format(caption="There might exist a dog and a cat."), None),
    ]
    with pytest.raises(ValueError, match="empty"):
        task_text("extract", " ", (), answered=False)
    for task, caption, nouns, message in (
        *((task, "  ", ["a dog"], "empty") for task in ("describe", "extract", "refer")),
        ("ground", "It rains.", [], "no noun"),
        ("paint", "A dog", ["A dog"], "paint"),
    ):
        with pytest.raises(ValueError, match=message):
            task_text(task, caption, nouns)


def test_loading_adds_seg_and_a_pad_token_and_refuses_what_cannot_end(tokenizer_dir, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, bare = (
        load_tokenizer(str(tokenizer_dir)),
        AutoTokenizer.from_pretrained(tokenizer_dir),
    )
    assert len(tokenizer) == len(bare) + 1
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    assert seg_id == len(tokenizer) - 1 and seg_id in tokenizer.all_special_ids
    assert tokenizer("dog <SEG>, ").input_ids.count(seg_id) == 1
    # Loading what was saved with <SEG> does not add another.
    tokenizer.save_pretrained(tmp_path / "again")
    assert len(load_tokenizer(str(tmp_path / "again"))) == len(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "no_pad")
    loaded = load_tokenizer(str(tmp_path / "no_pad"))
    assert loaded.pad_token == loaded.unk_token and len(loaded) == len(bare) + 1
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(str(tmp_path / "no_eos"))
    (tmp_path / "empty").mkdir()
    for path in ("", str(tmp_path / "absent"), str(tmp_path / "empty")):
        with pytest.raises(FileNotFoundError, match="MODEL.LANGUAGE.TOKENIZER"):
            load_tokenizer(path)


def sentencepiece_model(folder: Path, size: int = 32_000) -> None:
    """Write `tokenizer.model` as LLaMA's was trained: byte fallback, line ends and spaces kept."""
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder.mkdir()
    sentences = ("the dog stands beside a red chair", "a cat and the dog see a tree", "USER: the")
    (folder / "corpus").write_text("\n".join(sentences * 40))
    SentencePieceTrainer.train(
        input=str(folder / "corpus"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for number in range(size - len(model.pieces)):
        model.pieces.add(piece=f"filler{number}", score=-1e6 - number)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "corpus").unlink()
    (folder / "tokenizer.vocab").unlink()


LLAVA_CONFIG = {
    **{"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None},
}


@pytest.mark.parametrize("config", [None, LLAVA_CONFIG])
def test_a_sentencepiece_model_alone_has_llavas_ids(tmp_path, config) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = tmp_path / "llava-v1.5-7b"
    sentencepiece_model(folder)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_tokens_to_ids(SEG_TOKEN) == 32_000 and len(tokenizer) == 32_001
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("the dog", "a cat,  two blanks", "\nPlease help: é 🐕 ASSISTANT:", "USER: "):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    ids = tokenizer("a cat <SEG> and the dog <SEG>.", add_special_tokens=False)["input_ids"]
    assert ids.count(32_000) == 2 and tokenizer.unk_token_id not in ids


# -- captions that are cut -------------------------------------------------------------------------


def fit(tokenizer: Any, task: str, caption: str, phrases: Any, like: str, **options: Any) -> Any:
    """`fit_prompt` with one token less than the caption `like` with the nouns in it would need."""
    options |= {"num_image_tokens": 4, "system": ""}
    inside = [p for p in phrases if p["end"] <= len(like)]
    needed = fit_prompt(tokenizer, task, like, inside, policy="error", max_length=999, **options)
    length = len(needed.prompt.input_ids) - 1
    return fit_prompt(tokenizer, task, caption, phrases, policy="cut", max_length=length, **options)


def test_nouns_are_cut_whole_what_lies_behind_the_last_one_first(tokenizer):
    caption, phrases = make_caption(["a lamp", "the star"])
    fitted = fit(tokenizer, "ground", caption, phrases, like=caption)
    assert fitted.caption == "There is a lamp beside the star"
    assert (fitted.num_nouns, fitted.num_cut) == (2, 0)
    # Nested, unordered and absent ones.
    caption = "A man in a red hat sees a lamp"
    spans = [(0, 18), (9, 18), (0, 5), (-1, -1), (24, 30)]
    texts = ["A man in a red hat", "a red hat", "A man", "a ghost", "a lamp"]
    phrases = [{"text": t, "start": a, "end": b} for t, (a, b) in zip(texts, spans)]
    fitted = fit(tokenizer, "ground", caption, phrases, like=caption)
    # All nouns up to "red hat" fit there; the absent one goes with the noun before it.
    assert fitted.caption == "A man in a red hat"
    assert fitted.num_nouns == len(fitted.prompt.seg_positions) == 4
    with pytest.raises(ValueError, match="fit.*cut behind its first noun"):
        fit(tokenizer, "ground", caption, phrases, like=fitted.caption)


def test_descriptions_and_questions_are_cut_at_the_end_of_a_sentence(tokenizer):
    caption = "Mr. Lamp stands. A dog! runs here. The sky is blue"
    place = caption.index("A dog! runs")
    phrases = [{"text": "A dog! runs", "start": place, "end": place + 11}]
    for task, answered in (("describe", True), ("extract", False)):
        shown = fit(tokenizer, task, caption, phrases, like=caption, answered=answered)
        assert shown.caption == "Mr. Lamp stands. A dog! runs here." and shown.num_cut == 0
        # Neither behind "Mr." nor inside the noun.
        shown = fit(tokenizer, task, caption, phrases, like=shown.caption, answered=answered)
        assert shown.caption == "Mr. Lamp stands." and shown.num_cut == 1
        asked = prompts.decode_answer(tokenizer, shown.prompt.input_ids.tolist())
        assert ("<SEG>" not in asked) and ("stands." in asked) and "dog" not in asked
        with pytest.raises(ValueError, match="fit.*cut behind its first sentence"):
            fit(tokenizer, task, caption, phrases, like=shown.caption, answered=answered)


def test_a_tokenizer_without_seg_is_an_error(tokenizer_dir):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tokenizer_dir)
    caption, phrases = make_caption(["a lamp", "the star"])
    with pytest.raises(ValueError, match="2 nouns but 0 <SEG>"):
        fit(plain, "ground", caption, phrases, like=caption)
