"""Nouns that cannot be invented: an answer copies spans of the caption, under any tokenizer."""

import itertools
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import shapes
import tiny_language as tiny
import torch
from refusals import refused
from test_text import sentencepiece_model

from gella import GellaPredictor
from gella.modeling.generation import best_token
from gella.text.copying import CopiedNouns, Vocabulary
from gella.text.prompts import (
    IGNORE_INDEX,
    SEG_TOKEN,
    build_prompt,
    decode_answer,
    load_tokenizer,
    noun_answer,
    noun_answer_head,
)
from gella.text.spans import word_spans

ROOT = Path(__file__).resolve().parents[1]
RELEASE = ROOT / "weights" / "gella_tiny_shapes"
SCENE_WORDS = (
    "in this picture we can see a the two three small large red blue striped dotted circle circles "
    "star stars thing sand water sky wavy on left of and there is . , . and isn't"
).split()
SIGNS = (
    *(
        "ab cd",
        "éñ ß",
        "дом кот",
        "一只狗",
        "かな カナ",
        "हिन्दी में",
        "ไทย",
        "한국어",
        "a man's",
        "x-y",
    ),
    *(
        "🐶👨‍👩‍👧 👍🏽🇫🇷",
        "  \t\n\u3000",
        ".,;!?'\"-",
        "<0x41> ▁Ġ",
        "0 17 ½",
        "\u200d\u0301\ue000\U0010ffff",
    ),
)


def scene_caption(seed):
    rng = random.Random(seed)
    return " ".join(rng.choices(SCENE_WORDS, k=rng.randint(4, 40)))


def any_caption(seed):
    rng = random.Random(seed)
    parts = [rng.choice(SIGNS), *(rng.choice(rng.choice(SIGNS)) for _ in range(rng.randint(0, 30)))]
    parts.append(chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])))
    rng.shuffle(parts)
    return "".join(parts)


def bpe(folder, splits, decoder, normalizer=None, signs=(), bytes_as=()):
    """A tokenizer trained on the template and some captions, its merges across words if unsplit."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    whole = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=bool(bytes_as)))
    whole.decoder = decoder
    if splits is not None:
        whole.pre_tokenizer = splits
    if normalizer is not None:
        whole.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *bytes_as],
        initial_alphabet=list(signs),
        max_token_length=9,
        show_progress=False,
    )
    texts = [noun_answer(["the dog"] * n).replace(SEG_TOKEN, "") for n in range(1, 25)]
    whole.train_from_iterator([*texts, *map(scene_caption, range(20))], trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=whole, **names)
    saved.save_pretrained(folder)


KINDS = ("words", "across words", "sentencepiece", "blank behind <SEG>", "without bytes")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One of each kind."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    folder, level = tmp_path_factory.mktemp("kinds"), pre_tokenizers.ByteLevel
    signs = level.alphabet()
    bpe(
        folder / "1",
        level(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
        None,
        signs,
    )
    sentencepiece_model(folder / "2", 600)
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    back = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    bpe(folder / "3", None, back, blanks, (), [f"<0x{b:02X}>" for b in range(256)])
    bpe(folder / "4", pre_tokenizers.Metaspace(), decoders.Metaspace())
    places = [RELEASE / "tokenizer", *(folder / str(n) for n in range(1, 5))]
    return {kind: load_tokenizer(str(place)) for kind, place in zip(KINDS, places, strict=True)}


@pytest.fixture(scope="module")
def vocabularies(tokenizers):
    return {kind: Vocabulary(tokenizer) for kind, tokenizer in tokenizers.items()}


def walk(copied, vocabulary, rng):
    """A random answer of at most 500 tokens, of those that are allowed."""
    tokens = []
    while len(tokens) < 500:
        lists = copied.allowed()
        assert all(tokens == sorted(set(tokens)) != [] for tokens in lists)
        allowed = sorted(set().union(*lists))
        token = rng.choice(allowed)
        if vocabulary.seg in allowed and rng.random() < 0.3:
            token = vocabulary.seg
        if token == vocabulary.eos:
            assert allowed == [token]
            return tokens
        copied.append(token)
        tokens.append(token)
    raise AssertionError("the answer does not end")


def nouns_said(text):
    """The nouns of an answer by the template's words, whatever blanks a tokenizer adds."""
    first, *others, end = text.split(SEG_TOKEN)
    head, noun = first.split(", including ", 1)
    assert end.strip() == "." and f"{head}, including " in map(noun_answer_head, range(1, 99))
    joints = [re.match(r"\s*(,|and)\s(.*)", other, re.DOTALL) for other in others]
    assert all(joint[1] == "," for joint in joints[:-1])
    return [" ".join(n.split()) for n in (noun, *(joint[2] for joint in joints))]


def spans_of(caption, phrases):
    """Spans of extracted nouns, which begin and end with words, in order, none twice."""
    words, spans = word_spans(caption), [(phrase["start"], phrase["end"]) for phrase in phrases]
    assert [caption[s:e] for s, e in spans] == [phrase["text"] for phrase in phrases]
    assert {s for s, _ in spans} <= {s for s, _ in words}
    assert {e for _, e in spans} <= {e for _, e in words}
    assert all(s < e for s, e in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    return spans


@pytest.mark.parametrize("kind", KINDS)
def test_every_noun_is_a_span_of_the_caption(kind, tokenizers, vocabularies):
    tokenizer, vocabulary, number = tokenizers[kind], vocabularies[kind], KINDS.index(kind)
    captions = [scene_caption(seed) for seed in range(200 * number, 200 * number + 200)]
    captions += [any_caption(seed) for seed in range(40 * number, 40 * number + 40)]
    several = silent = 0
    for seed, caption in enumerate(captions):
        copied = CopiedNouns(vocabulary, caption)
        text = decode_answer(tokenizer, walk(copied, vocabulary, random.Random(seed)))
        if not copied.phrases:
            assert text == "" and not any(
                vocabulary.writes(caption[s:e]) for s, e in word_spans(caption)
            )
            silent += 1
            continue
        spans = spans_of(caption, copied.phrases)
        assert nouns_said(text) == [" ".join(caption[s:e].split()) for s, e in spans]
        several += len(spans) > 1
    assert several > 80 and silent < (30 if kind == "without bytes" else 10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_template_says_is_allowed_and_has_the_first_places(kind, tokenizers, vocabularies):
    tokenizer, vocabulary = tokenizers[kind], vocabularies[kind]
    for seed in range(40):
        rng, caption = random.Random(seed), scene_caption(seed)
        words = word_spans(caption)
        ends = sorted(rng.sample(range(2 * len(words)), 2 * rng.randint(1, min(6, len(words)))))
        chosen = [(words[a // 2][0], words[b // 2][1]) for a, b in zip(ends[::2], ends[1::2])]
        chosen = [s for k, s in enumerate(chosen) if not k or s[0] >= chosen[k - 1][1]]
        nouns, expected, behind = [caption[s:e] for s, e in chosen], [], 0
        for noun in nouns:  # the first place of each, with words whole
            place = re.compile(rf"(?<!\w){re.escape(noun)}(?!\w)").search(caption, behind)
            expected.append(place.span())
            behind = place.end()
        options = {"num_image_tokens": 1, "system": "", "max_length": 9999}
        prompt = build_prompt(tokenizer, caption, noun_answer(nouns), **options)
        copied = CopiedNouns(vocabulary, caption)
        for token in prompt.input_ids[prompt.labels != IGNORE_INDEX].tolist():
            assert token in set().union(*copied.allowed())
            copied.append(token)
        assert spans_of(caption, copied.phrases) == expected and token == vocabulary.eos


def answers_about(words, joints, vocabulary):
    """All answers about a caption of these words, as bytes, with a byte of no text for <SEG>."""
    count, found = len(words), set()
    spans = [(a, b) for a in range(count) for b in range(a + 1, count + 1)]
    texts = {
        (a, b): "".join(w + j for w, j in zip(words[a:b], [*joints[a : b - 1], ""]))
        for a, b in spans
    }
    for size in range(1, count + 1):
        for chosen in itertools.combinations(spans, size):
            if any(a[1] > b[0] for a, b in zip(chosen, chosen[1:])):
                continue
            nouns = [texts[span].encode() + b"\xff" for span in chosen]
            rows = {vocabulary.comma.join(nouns)}
            if size > 1:
                rows.add(vocabulary.comma.join(nouns[:-1]) + vocabulary.last + nouns[-1])
            for row, number in itertools.product(rows, range(1, count + 1)):
                if number > 1 or size == 1:
                    head = vocabulary.opening + noun_answer_head(number).encode()
                    found.add(head + row + vocabulary.end)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_is_whatever_may_still_become_an_answer(kind, vocabularies):
    vocabulary = vocabularies[kind]
    words, joints = ["a", "red", "and", "a", "red"], [" ", ", ", " ", " "]
    answers = answers_about(words, joints, vocabulary)
    begun = {answer[:size] for answer in answers for size in range(len(answer) + 1)}
    for seed in range(12):
        copied, rng, said = CopiedNouns(vocabulary, "a red,  and\na red!"), random.Random(seed), b""
        while True:
            expected = {i for i, text in vocabulary.texts.items() if said + text in begun}
            expected |= {vocabulary.seg} if said + b"\xff" in begun else set()
            allowed = sorted(set().union(*copied.allowed()))
            if said in answers:
                assert allowed == [vocabulary.eos]
                break
            # Left out is what another token takes to the end of the word.
            shorter = {vocabulary.texts[i] for i in expected - {*allowed}}
            longer = [vocabulary.texts.get(i, b"") for i in allowed]
            assert {*allowed} <= expected and not (shorter and vocabulary.joins_words)
            assert all(any(t.startswith(text) for t in longer) for text in shorter)
            token = rng.choice(allowed)
            said += b"\xff" if token == vocabulary.seg else vocabulary.texts[token]
            copied.append(token)


@torch.no_grad()
def uncached(decoder, grid, ids, copied, steps, eos):
    """The most probable allowed tokens, by a full pass per token."""
    answer = []
    while len(answer) < steps:
        full = torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])
        words = decoder.llama.get_input_embeddings()(full.clamp(min=0))
        words[full < 0] = decoder.image_tokens(grid)[0]
        token = best_token(decoder.llama(inputs_embeds=words[None]).logits[0, -1], copied)
        if token == eos:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("kind", KINDS[:3])
def test_alone_batched_streamed_and_drafted_are_one(kind, tokenizers, vocabularies):
    tokenizer, vocabulary = tokenizers[kind], vocabularies[kind]
    config = tiny.make_config(vocab_size=len(tokenizer), max_position_embeddings=600)
    decoder = tiny.make_decoder(config=config, max_positions=600, prompt_lookup_tokens=5)
    captions = [scene_caption(1)[:60], any_caption(7), "a"]
    options = {"num_image_tokens": 4, "system": "", "max_length": 600}
    ids = [build_prompt(tokenizer, caption, None, **options).input_ids for caption in captions]
    grid = torch.randn(3, tiny.IMAGE_DIM, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = {"eos_token_id": vocabulary.eos, "pad_token_id": tokenizer.pad_token_id}
    streamed = []
    streamer = SimpleNamespace(put=lambda x: streamed.extend(x.tolist()), end=lambda: None)

    def answer(places, **more):
        copies = [CopiedNouns(vocabulary, captions[i]) for i in places]
        given = grid[places], [ids[i] for i in places]
        said = decoder.generate(*given, max_new_tokens=40, choices=copies, **ends, **more)
        for i, tokens, copied in zip(places, said, copies):
            assert len(copied.phrases) == tokens.tolist().count(vocabulary.seg)
            spans_of(captions[i], copied.phrases)
        return [tokens.tolist() for tokens in said]

    joint = answer([0, 1, 2])
    snippets = [
        tokenizer(" There are two semantic nouns, including", add_special_tokens=False)["input_ids"]
    ]
    for i, caption in enumerate(captions):
        copied = CopiedNouns(vocabulary, caption)
        assert joint[i] == uncached(decoder, grid[i : i + 1], ids[i], copied, 40, vocabulary.eos)
        for more in ({}, {"snippets": snippets}):
            streamed.clear()
            assert answer([i], streamer=streamer, **more) == [joint[i]]
            assert streamed[-len(joint[i]) :] == joint[i] or streamed[-1] == vocabulary.eos
    # One of a batch may be free.
    copies = [CopiedNouns(vocabulary, captions[0]), None]
    one, free = decoder.generate(grid[:2], ids[:2], max_new_tokens=20, choices=copies, **ends)
    assert one.tolist() == joint[0][:20]
    (alone,) = decoder.generate(grid[1:2], ids[1:2], max_new_tokens=20, **ends)
    assert free.tolist() == alone.tolist()


def test_the_released_weights_copy_and_say_what_they_said_where_it_was_valid():
    predictor = GellaPredictor.from_config(RELEASE / "config.yaml")
    sample = ROOT / "examples" / "shapes" / "000000500002"
    predictor.set_image(f"{sample}.png", f"{sample}_masks.png")
    held_out = [shapes.make_sample(0, "val", k).narratives[0]["caption"] for k in range(5)]
    valid = 0
    for caption in [*held_out, *map(any_caption, range(3))]:
        texts = []
        for copies in (True, False):
            predictor.model.inference_options = SimpleNamespace(COPY_NOUNS=copies)
            nouns = predictor.extract_nouns(caption, on_text=texts.append)
            texts = [*texts[: 1 - copies], texts[-1]]
            if copies:
                spans = spans_of(caption, nouns.phrases)
                assert nouns == [caption[start:end] for start, end in spans] != []
        copied = CopiedNouns(predictor.model._vocabulary, caption)
        ids = predictor.tokenizer(f" {texts[1]}", add_special_tokens=False)["input_ids"]
        if all(i in set().union(*copied.allowed()) and copied.append(i) is None for i in ids):
            valid += 1
            assert texts[0] == texts[1]
    assert 0 < valid < 8


def test_words_of_any_script():
    for text, words in (
        ("a red circle, the man's U.S. T-shirt", "a|red|circle|the|man|s|U|S|T|shirt"),
        ("हिन्दी में", "हिन्दी|में"),
        ("👨‍👩‍👧 on 👍🏽☀️", "👨‍👩‍👧|on|👍🏽|☀️"),
        ("一只狗 in x_1", "一|只|狗|in|x_1"),
        ("a\u200d b, \u0301 .", "a\u200d|b"),
        ("... ?!", ""),
    ):
        assert "|".join(text[start:end] for start, end in word_spans(text)) == words


def test_what_cannot_be_written_cannot_be_copied(vocabularies):
    vocabulary = vocabularies["without bytes"]
    copied = CopiedNouns(vocabulary, "a red sn☃w 一 sand, . ☃ . the star.")
    nouns = {bytes(text) for text in copied._text.split(b"\xff") if text}
    assert nouns == {b"a red sn", b"w", b"sand", b"the star"}
    assert CopiedNouns(vocabulary, "☃ 一").allowed() == [[vocabulary.eos]]
    assert CopiedNouns(vocabulary, "...").allowed() == [[vocabulary.eos]]


def test_a_tokenizer_that_cannot_write_the_template_is_named(tmp_path):
    from tokenizers import decoders, normalizers, pre_tokenizers

    splits = pre_tokenizers.ByteLevel(add_prefix_space=False)
    signs = pre_tokenizers.ByteLevel.alphabet()
    bpe(tmp_path / "lower", splits, decoders.ByteLevel(), normalizers.Lowercase(), signs)
    tokenizer = load_tokenizer(str(tmp_path / "lower"))
    refused("tokens that say .*there are.*MODEL.GELLA.COPY_NOUNS", Vocabulary, tokenizer)
