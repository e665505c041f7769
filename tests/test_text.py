"""Prompts and answers, spans in captions, captions that are cut, and English words."""

import json

import pytest
import torch
from refusals import refused
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


def test_numbers_in_words():
    known = {0: "zero", 11: "eleven", 20: "twenty", 21: "twenty one", 99: "ninety nine"}
    known |= {100: "one hundred", 119: "one hundred nineteen", 340: "three hundred forty"}
    known |= {999: "nine hundred ninety nine", 12001: "twelve thousand one"}
    assert {n: number_in_words(n) for n in known} == known
    value = {number_in_words(n): n for n in [*range(20), *range(20, 100, 10)]}
    for n in range(1000):
        total = 0
        for word in number_in_words(n).split():
            total = total * 100 if word == "hundred" else total + value[word]
        assert total == n
    refused("-1", number_in_words, -1)


NUMBERS = {
    True: "the dogs, two white circles, a man and a woman, a group of people, men on horses, 3 cups"
    ", a few, children",
    False: "a dog, a glass of water, the bus, grass, the man in shorts, the dog's tail, "
    "the wall with windows, ",
}


@pytest.mark.parametrize("several", NUMBERS)
def test_the_words_tell_whether_a_noun_names_several(several):
    nouns = NUMBERS[several].split(", ")
    assert [noun for noun in nouns if names_several(noun) != several] == []


def test_determiners_plurals_and_lists():
    nouns = {"The  big Dog": "big Dog", "all the": "the", "my other dogs": "other dogs"}
    assert {noun: bare_noun(noun) for noun in nouns} == nouns
    assert bare_noun("all my 3 other dogs", counts=True) == "dogs"
    assert other_numbers("a Woman") == ["a women"] and other_numbers("leaves") == ["leaf"]
    assert {"cherries", "cherrys"} <= set(other_numbers("cherry"))
    assert "red bus" in other_numbers("red buses") and "glas" not in other_numbers("glass")
    assert in_a_row(["a"]) == "a" and in_a_row(["a", "b", "c"]) == "a, b and c"


def test_answers_to_the_letter():
    for nouns, said in (
        (["a dog"], "is one semantic noun, including a dog <SEG>."),
        (["a dog", "the sky"], "are two semantic nouns, including a dog <SEG> and the sky <SEG>."),
        (["a", "b", "c"], "are three semantic nouns, including a <SEG>, b <SEG> and c <SEG>."),
    ):
        assert noun_answer(nouns) == f"There {said}"
    names = ["person", "dog", "orange", "unicycle", "window"]
    said = "There might exist a person{0}, a dog{0}, an orange{0}, a unicycle{0} and a window{0}."
    assert panoptic_answer(names) == said.format(" <SEG>")
    assert panoptic_sentence(names) == said.format("")


@pytest.mark.parametrize("nouns", [
    ["a dog"],
    ["salt and pepper", "a black, white and red flag", "the sky"],
    ["the sky", "salt and pepper"],
    ["and so on", "and so on", "and so on"],
    ["a sign, including text", "it"],
    ["a man's hat", "10 % of it", "café", "犬"],
    ["the dog"] * 21,
])  # fmt: skip
def test_nouns_survive_the_round_trip(nouns):
    assert parse_nouns(noun_answer(nouns)) == nouns


def test_parsing_forgives_what_models_write_and_answers_refuse_bad_nouns():
    loose = "There are two semantic nouns, including a dog<SEG>, and a cat<SEG>."
    assert parse_nouns(loose) == parse_nouns(panoptic_answer(["dog", "cat"])) == ["a dog", "a cat"]
    assert parse_nouns("a  dog <SEG> <SEG> and then nothing") == ["a dog", ""]
    assert parse_nouns("There is nothing.") == []
    for nouns in ([], ["a dog", "  "], ["a <SEG>"], ["an <image>"]):
        refused("noun", noun_answer, nouns)


def test_spoken_names_of_coco_are_distinct(coco_sample):
    text = (coco_sample / "annotations" / "panoptic_coco_categories.json").read_text()
    names = {category["name"]: spoken_name(category["name"]) for category in json.loads(text)}
    assert len(set(names.values())) == 133
    assert not any("-" in name or "merged" in name for name in names.values())
    known = {"wall-other-merged": "wall", "wall-brick": "wall brick", "teddy bear": "teddy bear"}
    assert names.items() >= {**known, "sky-other-merged": "sky"}.items()


def test_locating_walks_left_to_right():
    caption = "A dog and another Dog chase cats; a  cat sleeps."
    spans = locate_phrases(caption, ["dog", "dog", "unicorn", "a cat", "dog"])
    assert spans[2] is None and spans[4] is None
    assert [caption[s[0] : s[1]] for s in spans if s] == ["dog", "Dog", "a  cat"]
    assert spans[0] != spans[1] and locate_phrases("category of a cat", ["cat"]) == [(14, 17)]
    assert locate_phrases("many cats", ["cat"]) == [(5, 8)]
    assert locate_phrases("a (b] c", ["(b]", ""]) == [(2, 5), None]


def test_alignment_of_the_sample_narratives(coco_sample):
    path = coco_sample / "annotations" / "png_coco_val2017.json"
    records = json.loads(path.read_text())
    assert len(records) == 4
    for record in records:
        utterances, end = [segment["utterance"] for segment in record["segments"]], 0
        spans = align_utterances(record["caption"], utterances)
        for utterance, (start, stop) in zip(utterances, spans):
            said = record["caption"][start:stop].lower()
            assert said.replace(" ", "") == utterance.lower().replace(" ", "")
            assert not record["caption"][end:start].strip()  # nothing lies between
            end = stop


ISNT = "There isn't a dog, (a cat) and the man's red-brown hat ."
BARE = "There is,n't,a dog,a cat,and,the man,'s,red-brown hat".split(",")


@pytest.mark.parametrize("caption, utterances, said", [
    ("There  isn't a  Dog's “bed”,\nand the dog's bed.",
     "there is|n't a|dog 's|\" bed \"|, and the|dog's|bed|.",
     ["There  is", "n't a", "Dog's", "“bed”", ",\nand the", "dog's", "bed", "."]),
    ("In the park, a black dog runs. The sky is blue.",
     "in the park|a black dog|runs|!|a purple xylophone|the sky|is blue .",
     ["In the park", "a black dog", "runs", None, None, "The sky", "is blue."]),
    ("", "a|", [None, None]),
    ("a dog", "a dog|", ["a dog", None]),
    (ISNT, "there is|n't|a dog|,|( a cat )|and|the man|'s|red - brown hat.",
     [*BARE[:3], ",", "(a cat)", *BARE[4:7], "red-brown hat ."]),
    # The caption has signs that no utterance has, and the other way round.
    (ISNT, "there is|n't|a dog|a cat|and|the man|'s|red brown hat", BARE),
    (ISNT, "there is|n't|a dog ;|a cat|and|\" the man|'s|red brown hat|!", [*BARE, None]),
])  # fmt: skip
def test_alignment_survives_other_spelling_and_reports_what_is_not_there(caption, utterances, said):
    spans = align_utterances(caption, utterances.split("|"))
    assert [caption[span[0] : span[1]] if span else None for span in spans] == said


def test_labels_cover_the_answer_and_seg_positions_its_nouns(tokenizer):
    nouns = ["the red circle", "a star", "the red circle"]
    instruction, answer = task_text("ground", "The red circle and a star.", nouns)
    options = {"num_image_tokens": 9, "system": "A chat.", "max_length": 400}
    prompt = build_prompt(tokenizer, instruction, answer, **options)
    question = build_prompt(tokenizer, instruction, None, **options)
    ids, labels, places = prompt.input_ids, prompt.labels, prompt.seg_positions
    length = len(question.input_ids)
    assert all(x.dtype == torch.int64 and x.ndim == 1 for x in (ids, labels, places))
    # What generation starts from is what training conditions on.
    assert torch.equal(ids[:length], question.input_ids)
    assert (question.labels == IGNORE_INDEX).all() and len(question.seg_positions) == 0
    assert (labels[:length] == IGNORE_INDEX).all() and torch.equal(labels[length:], ids[length:])
    assert ids[-1] == tokenizer.eos_token_id and (ids == IMAGE_TOKEN_ID).sum() == 9
    said = tokenizer.decode(labels[length:-1]).strip().replace(" <SEG>", "<SEG>")
    assert said == answer.replace(" <SEG>", "<SEG>")
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    assert len(places) == len(nouns) and (ids[places] == seg_id).all()
    for noun, position in zip(nouns, places.tolist()):
        assert tokenizer.decode(ids[length:position].tolist()).endswith(noun)


def test_the_template_is_vicunas(tokenizer):
    prompt = build_prompt(tokenizer, "Hi?", "Yes.", num_image_tokens=2, system="S.", max_length=99)
    ids = prompt.input_ids.tolist()
    first = ids.index(IMAGE_TOKEN_ID)
    assert ids[0] == tokenizer.bos_token_id and ids[first : first + 2] == [IMAGE_TOKEN_ID] * 2
    assert tokenizer.decode(ids[1:first]) == "S. USER: "
    assert tokenizer.decode(ids[first + 2 :]) == "\nHi? ASSISTANT: Yes.</s>"
    bare = build_prompt(tokenizer, "Hi?", None, num_image_tokens=0, system="", max_length=99)
    assert tokenizer.decode(bare.input_ids) == "<s>USER: \nHi? ASSISTANT:"


def test_decoding_a_generated_answer_gives_its_text_back(tokenizer):
    answer = noun_answer(["a dog", "salt, and pepper", "café"])
    prompt = build_prompt(tokenizer, "?", answer, num_image_tokens=1, system="", max_length=200)
    ids = prompt.labels[prompt.labels != IGNORE_INDEX].tolist()
    assert decode_answer(tokenizer, ids + [tokenizer.pad_token_id] * 3) == answer


@pytest.mark.parametrize("text", ["a <SEG> b", "see <image>", "end</s>", "<s>", "<pad>"])
def test_the_templates_own_marks_are_refused_in_texts(tokenizer, text):
    options = {"num_image_tokens": 1, "system": "", "max_length": 99}
    refused("holds", build_prompt, tokenizer, text, None, **options)
    if SEG_TOKEN not in text:
        refused("answer holds", build_prompt, tokenizer, "?", text, **options)


def test_too_long_a_prompt_names_both_numbers(tokenizer):
    def build(answer, max_length):
        options = {"num_image_tokens": 30, "system": "", "max_length": max_length}
        return build_prompt(tokenizer, "Hi", answer, **options).input_ids

    # Without an answer there must be room for one token of it.
    for answer, room, more in (("Ho", 0, ""), (None, 1, ", with one left")):
        length = len(build(answer, 999))
        build(answer, length + room)
        with pytest.raises(OverlongPrompt, match=rf"{length} tokens.*{length - 1} fit{more}"):
            build(answer, length + room - 1)


def test_texts_of_the_tasks():
    assert DESCRIBE_INSTRUCTIONS[0] == "Please help me describe the image."
    said = "Please help me extract each semantic noun of the sentence. The sentence is A {dog}."
    asked, other = "There might exist a dog and a cat.", EXTRACT_INSTRUCTIONS[1]
    names, one = ["dog", "cat"], ["A {dog}"]
    assert task_text("describe", "A {dog}. ", []) == (DESCRIBE_INSTRUCTIONS[0], "A {dog}.")
    assert task_text("extract", "A {dog}.", one) == (said, noun_answer(one))
    wordings = 1 + len(EXTRACT_INSTRUCTIONS)
    assert task_text("ground", "A dog", ["A dog"], wordings)[0] == other.format(caption="A dog")
    assert task_text("refer", "left man", [])[1] == noun_answer(["left man"])
    question, answer = task_text("panoptic", "", names)
    assert question.endswith(asked) and answer == panoptic_answer(names)
    for texts, question in (
        (("describe", "", ()), DESCRIBE_INSTRUCTIONS[1]),
        (("extract", " A dog ", ()), other.format(caption="A dog")),
        (("panoptic", "", names), other.format(caption=asked)),
    ):
        assert task_text(*texts, 5, answered=False) == (question, None)
    refused("empty", task_text, "extract", " ", (), answered=False)
    for task, caption, nouns, message in (
        *((task, "  ", ["a dog"], "empty") for task in ("describe", "extract", "refer")),
        ("ground", "It rains.", [], "no noun"),
        ("paint", "A dog", ["A dog"], "paint"),
    ):
        refused(message, task_text, task, caption, nouns)


def test_loading_adds_seg_and_a_pad_token_and_refuses_what_cannot_end(tokenizer_dir, tmp_path):
    from transformers import AutoTokenizer

    def saved(tokenizer, name):
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    bare = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    assert seg_id == len(bare) == len(tokenizer) - 1 and seg_id in tokenizer.all_special_ids
    assert tokenizer("dog <SEG>, ").input_ids.count(seg_id) == 1
    assert len(load_tokenizer(saved(tokenizer, "again"))) == len(tokenizer)
    bare.pad_token = None
    loaded = load_tokenizer(saved(bare, "no_pad"))
    assert loaded.pad_token == loaded.unk_token and len(loaded) == len(bare) + 1
    bare.eos_token = None
    refused("eos_token", load_tokenizer, saved(bare, "no_eos"))
    (tmp_path / "empty").mkdir()
    for path in ("", str(tmp_path / "absent"), str(tmp_path / "empty")):
        refused("MODEL.LANGUAGE.TOKENIZER", load_tokenizer, path, error=FileNotFoundError)


def sentencepiece_model(folder, size=32_000):
    """Write `tokenizer.model` as LLaMA's was trained: byte fallback, line ends and spaces kept."""
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder.mkdir()
    sentences = ("the dog stands beside a red chair", "a cat and the dog see a tree", "USER: the")
    (folder / "corpus").write_text("\n".join(sentences * 40))
    files = {"input": str(folder / "corpus"), "model_prefix": str(folder / "tokenizer")}
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sizes = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "minloglevel": 2}
    SentencePieceTrainer.train(**files, **plain, **sizes)
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
def test_a_sentencepiece_model_alone_has_llavas_ids(tmp_path, config):
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


def fit(tokenizer, task, caption, phrases, like, **options):
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
    caption = "A man in a red hat sees a lamp"
    spans = [(0, 18), (9, 18), (0, 5), (-1, -1), (24, 30)]
    texts = ["A man in a red hat", "a red hat", "A man", "a ghost", "a lamp"]
    phrases = [{"text": t, "start": a, "end": b} for t, (a, b) in zip(texts, spans)]
    fitted = fit(tokenizer, "ground", caption, phrases, like=caption)
    # All nouns up to "red hat" fit there; the absent one goes with the noun before it.
    assert fitted.caption == "A man in a red hat"
    assert fitted.num_nouns == len(fitted.prompt.seg_positions) == 4
    told = "fit.*cut behind its first noun"
    refused(told, fit, tokenizer, "ground", caption, phrases, like=fitted.caption)


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
    refused("2 nouns but 0 <SEG>", fit, plain, "ground", caption, phrases, like=caption)
