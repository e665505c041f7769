"""Answers to noun extraction that cannot invent a noun: every one is copied from the caption.

What stands between the words of :func:`gella.text.prompts.noun_answer` is a span of the caption
that begins and ends with a word, behind the span before it. Token by token only what may still
become such an answer is allowed, judged by the bytes that tokens write: any tokenizer will do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from gella.text import prompts
from gella.text.spans import word_spans

_WALL = b"\xff"  # a byte of no text; tokens that have it are left out
# The printable characters by which byte-level tokenizers write the 256 bytes (GPT-2's rule).
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PLAIN))
_BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + k): b for k, b in enumerate(_OTHERS)}


class Vocabulary:
    """The tokens of a tokenizer as the bytes that they write, and the template in its form.

    Attributes:
        texts: what :func:`token_bytes` gives.
        ids: ids of the tokens that write these bytes; an empty list for the beginning of a token.
        longest: bytes of the longest token. joins_words: whether a token may hold several words.
        seg, eos: ids of <SEG> and of the end of sentence.
        opening, comma, last, end: what stands before the template's first word, between two nouns,
            before the last noun and behind it. Some tokenizers put a blank behind <SEG>.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read a tokenizer of ``prompts.load_tokenizer``.

        Raises:
            ValueError: its tokens cannot write the template character by character.
        """
        self.seg = tokenizer.convert_tokens_to_ids(prompts.SEG_TOKEN)
        self.eos = tokenizer.eos_token_id
        self.texts = token_bytes(tokenizer)
        self.ids: dict[bytes, list[int]] = {b"": []}
        for i, text in self.texts.items():
            for size in range(1, len(text)):
                self.ids.setdefault(text[:size], [])
            self.ids.setdefault(text, []).append(i)
        self.longest = max(map(len, self.texts.values()))
        self.joins_words = any(
            map(re.compile(rb"[\w\x80-\xff] [\w\x80-\xff]").search, self.texts.values())
        )
        said, self.comma, self.last, self.end = self._template(tokenizer)
        head = prompts.noun_answer_head(3)
        heads = "".join(map(prompts.noun_answer_head, range(1, 99)))
        if not said.endswith(head.encode()) or not self.writes(f"{heads},."):
            raise ValueError(
                f"the tokenizer turns {head!r} into tokens that say {said!r}: nouns cannot be "
                "copied with it; set MODEL.GELLA.COPY_NOUNS to False"
            )
        self.opening = said[: -len(head)]

    def _template(self, tokenizer: Any) -> list[bytes]:
        """What an answer says before each of three nouns and behind the last."""
        answer = prompts.noun_answer(["the"] * 3)
        limits: Any = {"num_image_tokens": 0, "system": "", "max_length": 2**20}
        prompt = prompts.build_prompt(tokenizer, "", answer, **limits)
        ids = prompt.input_ids[prompt.labels != prompts.IGNORE_INDEX].tolist()
        said = b"".join(_WALL if i == self.seg else self.texts.get(i, b"") for i in ids)
        return [part.removesuffix(b"the") for part in said.split(_WALL)]

    def writes(self, text: str) -> bool:
        """Whether every character of a text, or each of its bytes, is a token."""
        return all(
            self.ids.get(c.encode()) or all(self.ids.get(bytes([b])) for b in c.encode())
            for c in set(text)
        )


class CopiedNouns:
    """Says which tokens may come next in an answer about one caption.

    The number that the answer begins with may be any for which the caption has words. It need not
    be that of the nouns: the list ends where the model ends it, or the caption does. A noun that
    the caption has several times is the first behind the nouns before it.

    Attributes:
        phrases: ``text``, ``start`` and ``end`` of the noun before each <SEG> so far.
    """

    def __init__(self, vocabulary: Vocabulary, caption: str) -> None:
        """Begin an answer. A caption without a word that tokens can write gets an empty one."""
        self._vocabulary, self._caption = vocabulary, caption
        self.phrases: list[dict[str, Any]] = []
        self._text, self._starts, self._ends = _copyable(vocabulary, caption)
        heads = [prompts.noun_answer_head(n) for n in range(1, len(self._starts) + 1)]
        # What was said behind the last <SEG>, and what may stand there before a noun.
        self._said, self._leads = b"", [vocabulary.opening + head.encode() for head in heads]
        self._ones = (vocabulary.last, *self._leads[:1])  # one noun follows them
        self._cursor = 0  # in the text, behind the last noun
        self._tokens = functools.cache(self._tokens_from)  # every noun may begin anywhere

    def allowed(self) -> list[list[int]]:
        """Ids of the tokens that may come next, ascending.

        Inside a noun a list for each place of the caption that it may be copied from, in order, and
        then one for its end; elsewhere one list. Never none.
        """
        said, noun, end = self._said, self._noun(), self._vocabulary.end
        if noun:
            copies = list(self._copies(noun))
            lists = [self._tokens(place) for place in copies]
            lists.append([self._vocabulary.seg] if self._ends.keys() & copies else [])
        else:
            rests = {lead[len(said) :] for lead in self._leads if lead.startswith(said)}
            begun = rests & self._vocabulary.ids.keys()  # a token may reach into the noun
            places = [place for place in self._starts if place >= self._cursor]
            found = [self._tokens(place, rest) for rest in begun for place in places]
            if self.phrases and end.startswith(said):
                rests.add(end[len(said) :])
            found += [self._tokens(0, rest) for rest in rests]  # 0: the wall, where it ends
            lists = [sorted(set().union(*found))]
        return [tokens for tokens in lists if tokens] or [[self._vocabulary.eos]]

    def append(self, token: int) -> None:
        """Go on with one of the allowed tokens."""
        vocabulary = self._vocabulary
        if token != vocabulary.seg:
            self._said += vocabulary.texts.get(token, b"")
            return
        noun = self._noun()
        end = next(end for end in self._copies(noun) if end in self._ends)
        first, behind = self._starts[end - len(noun)], self._ends[end]
        text = self._caption[first:behind]
        self.phrases.append({"text": text, "start": first, "end": behind})
        last = self._said.startswith(self._ones) or max(self._starts) < end
        self._said, self._cursor = b"", end
        self._leads = [] if last else [vocabulary.comma, vocabulary.last]

    def _noun(self) -> bytes:
        """What was said of the noun that is being written."""
        leads = [lead for lead in self._leads if self._said.startswith(lead)]
        return self._said[len(leads[0]) :] if leads else b""

    def _tokens_from(self, place: int, before: bytes = b"") -> list[int]:
        """Tokens that say a text, or begin it: something `before` and then the caption's text.

        Where a token reaches the end of a word, those that stop inside are left out, as a tokenizer
        leaves them out that joins no words: "a" is no beginning of "and".
        """
        vocabulary = self._vocabulary
        text = before + self._text[place : place + vocabulary.longest]
        found: list[int] = []
        words = 0  # tokens that reach the end of a word, the first of those found
        for size in range(1, len(text) + 1):
            tokens = vocabulary.ids.get(text[:size])
            if tokens is None:
                break
            if size > len(before) and place + size - len(before) in self._ends:
                kept = words if tokens and not vocabulary.joins_words else None
                found = found[:kept] + tokens
                words = len(found)
            else:
                found += tokens
        return sorted(found)

    def _copies(self, noun: bytes) -> Iterator[int]:
        """Ends of what can be copied from behind the last noun and begins so."""
        start = self._text.find(noun, self._cursor)
        while start >= 0:
            if start in self._starts:
                yield start + len(noun)
            start = self._text.find(noun, start + 1)


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What every token writes behind another one, by id; the special tokens are left out."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    # Only the first token of a text loses its leading blank.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    head, *decoded = tokenizer.batch_decode(
        [before, *([*before, i] for i in ids)], clean_up_tokenization_spaces=False
    )
    texts = {}
    for i, name, text in zip(ids, tokenizer.convert_ids_to_tokens(ids), decoded):
        written = text[len(head) :].encode()
        if "\ufffd" in text:  # a part of a character, whose bytes the token's name has
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
                written = bytes.fromhex(byte[1])
            elif _BYTES.keys() >= set(name):
                written = bytes(map(_BYTES.__getitem__, name))
        if written and _WALL not in written:
            texts[i] = written
    return texts


def _copyable(vocabulary: Vocabulary, caption: str) -> tuple[bytes, dict[int, int], dict[int, int]]:
    """A caption as nouns may copy it: white space is one blank, and a wall stands for what no noun
    may hold, so that whatever is copied can go on to the end of a word.

    Returns:
        its bytes; where words start in them and where they end, each with the caption's character.
    """
    text, starts, ends, behind = _WALL, {}, {}, 0
    for start, end in word_spans(caption):
        word = caption[start:end]
        if vocabulary.writes(word):
            gap = re.sub(r"\s+", " ", caption[behind:start])
            text += gap.encode() if behind and vocabulary.writes(gap) else _WALL
            starts[len(text)] = start
            text += word.encode()
            ends[len(text)] = behind = end
    return text, starts, ends
