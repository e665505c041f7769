"""Prompts: what the language decoder is told and what it has to answer, and the way back.

Every task is one question and one answer in LLaVA-1.5's conversation (Vicuna v1). Answers name
nouns, each followed by one `<SEG>`, whose embedding is the noun's `E_vl` (paper, eq. 4).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from gella.text.words import in_a_row, number_in_words, with_article
from gella.utils.hub import hub_options

SEG_TOKEN = "<SEG>"
IMAGE_MARK = "<image>"  # never in the text itself; the template puts the image tokens there
IMAGE_TOKEN_ID = -200  # stands in `input_ids` for one projected image token
IGNORE_INDEX = -100  # label of a position without loss
TASKS = ("describe", "extract", "ground")

# The first of each is the paper's; training draws among them, evaluation takes the first.
DESCRIBE_INSTRUCTIONS = (
    "Please help me describe the image.",
    "Please describe the image.",
    "What can be seen in the image?",
    "Tell me what the image shows.",
)
EXTRACT_INSTRUCTIONS = (
    "Please help me extract each semantic noun of the sentence. The sentence is {caption}",
    "Please extract each semantic noun of the sentence. The sentence is {caption}",
    "Which semantic nouns does the sentence hold? The sentence is {caption}",
    "Find all semantic nouns of the sentence. The sentence is {caption}",
)
POLICIES = ("error", "cut")
"""Values of INPUT.GELLA.OVERLONG_CAPTION: what becomes of a caption that does not fit."""
# An expression is a noun itself, and without a category its entities would take a wrong one.
_CUTTABLE = ("describe", "extract", "ground")
# Three letters before the mark: "Mr." and "St." end no sentence. Fewer places are no harm.
_SENTENCE_END = re.compile(r"(?<=\w{3})[.!?;]+[\"'”’)]*(?=\s)")


class OverlongPrompt(ValueError):
    """A prompt has more tokens than the language model takes; the message has both numbers."""


@dataclass
class Prompt:
    """One conversation as token ids.

    Attributes:
        input_ids: int64 (L,), image tokens as IMAGE_TOKEN_ID.
        labels: int64 (L,), equal to `input_ids` at the answer and its end of sentence, IGNORE_INDEX
            elsewhere. Not shifted: position i holds the label *of* token i.
        seg_positions: int64 (P,), places of the answer's `<SEG>` tokens, in order.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    seg_positions: torch.Tensor


@dataclass
class FittedPrompt:
    """A prompt that fits.

    Attributes:
        prompt: its token ids.
        caption: the part of the caption that it holds, from the first character on.
        num_nouns: the first so many of the given nouns lie in that part; an answer that names nouns
            names exactly these.
        num_cut: the others.
    """

    prompt: Prompt
    caption: str
    num_nouns: int
    num_cut: int


def load_tokenizer(path: str) -> Any:
    """Read a transformers tokenizer (a folder, or a name on the hub) and give it one `<SEG>`.

    A folder with nothing but `tokenizer.model`, a SentencePiece model, is LLaMA's and LLaVA's.
    Without a pad token it takes the unknown token for it (as LLaVA does), or else the end of
    sentence. Raises FileNotFoundError when nothing readable is there and ValueError when the
    tokenizer has no end of sentence.
    """
    from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

    # Single sentences gain nothing from its threads, and they do not survive a worker's fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    advice = (
        "set MODEL.LANGUAGE.TOKENIZER to a folder that holds tokenizer.json or tokenizer.model; "
        "`tools/convert_weights.py --config-file CONFIG --from-hub` makes LLaVA's, and `python "
        "datasets/prepare_shapes.py` that of the synthetic shapes"
    )
    try:
        folder = os.path.expanduser(path)
        # Without a configuration AutoTokenizer takes words and no rules: line ends get lost.
        names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        whole = names & {"tokenizer.json", "tokenizer_config.json"}
        bare = "tokenizer.model" in names and not whole
        kind = LlamaTokenizer if bare else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, **hub_options(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise FileNotFoundError(
            f"no tokenizer can be read from {path!r} ({reason[0]}); {advice}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no eos_token; answers could never end")
    # `lstrip` swallows the space before it, which would cost a token of its own per noun.
    seg = AddedToken(SEG_TOKEN, lstrip=True, rstrip=False, normalized=False, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [seg]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def noun_answer(nouns: Sequence[str]) -> str:
    """The answer to noun extraction and grounding (paper, Table 1), one `<SEG>` per noun.

    White space inside a noun becomes one blank. Raises ValueError without any noun, for an empty
    noun and for one that holds a token of the template.
    """
    if not nouns:
        raise ValueError("there is no noun to answer with; the caption must name at least one")
    marked = [f"{_clean(noun)} {SEG_TOKEN}" for noun in nouns]
    return f"{noun_answer_head(len(marked))}{in_a_row(marked)}."


def noun_answer_head(count: int) -> str:
    """What stands before the first noun of `noun_answer`, with a blank at its end."""
    if count == 1:
        return "There is one semantic noun, including "
    return f"There are {number_in_words(count)} semantic nouns, including "


def panoptic_answer(names: Sequence[str]) -> str:
    """The answer of panoptic inference: "There might exist a person <SEG>, ... and a dog <SEG>."

    Args:
        names: category names, at least one; articles are put before them.
    """
    if not names:
        raise ValueError("there is no category name to list; give at least one")
    marked = [f"{with_article(_clean(name))} {SEG_TOKEN}" for name in names]
    return f"There might exist {in_a_row(marked)}."


def panoptic_sentence(names: Sequence[str]) -> str:
    """`panoptic_answer` without its `<SEG>` tokens: the sentence that is asked about."""
    return panoptic_answer(names).replace(f" {SEG_TOKEN}", "")


def spoken_name(category: str) -> str:
    """A COCO panoptic category name as words: "wall-other-merged" -> "wall", "net" -> "net".

    The 133 names of COCO stay distinct.
    """
    name = re.sub(r"(-(other|merged|stuff))+$", "", category)
    return _clean(re.sub(r"[-_]+", " ", name))


def parse_nouns(answer: str) -> list[str]:
    """Nouns of an answer, one per `<SEG>`, in order: the inverse of `noun_answer`.

    Generated answers may deviate: what stands before a `<SEG>` is its noun, possibly empty, so the
    result always has as many entries as the answer has `<SEG>`; text after the last is ignored.
    """
    first, *others = answer.split(SEG_TOKEN)[:-1] or [""]
    nouns = [re.split(r"\bincluding\b|\bmight exist\b", first, maxsplit=1)[-1]]
    for number, chunk in enumerate(others, start=1):
        text = chunk.strip()
        # The template has no comma before the last "and", which may be a noun's own elsewhere.
        joined = number == len(others) or not text.startswith(",")
        text = text.removeprefix(",")
        nouns.append(re.sub(r"^\s*and\b", "", text) if joined else text)
    return [" ".join(noun.split()) for noun in nouns] if SEG_TOKEN in answer else []


def task_text(
    task: str,
    caption: str,
    nouns: Sequence[str],
    phrasing: int = 0,
    *,
    answered: bool = True,
) -> tuple[str, str | None]:
    """Question and answer of a task, as text.

    Args:
        task: "describe", "extract" or "ground"; also "panoptic" (`nouns` are category names, the
            caption is not read) and "refer" (`caption` is the expression and the only noun).
        caption: the sentence. ValueError for a blank one where it is read.
        nouns: its nouns, in order; not read by "describe" and "refer".
        phrasing: of the question, counted round; 0 is the paper's.
        answered: False gives no answer, and reads the caption of "describe" and the nouns of
            "extract" and "ground" not.
    """
    if task not in (*TASKS, "panoptic", "refer"):
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}, panoptic, refer")
    sentence = caption.strip()
    if not sentence and task != "panoptic" and (answered or task != "describe"):
        raise ValueError(f"the caption is empty; task {task!r} needs a sentence")
    if task == "panoptic":
        sentence = panoptic_sentence(nouns)
    phrasings = DESCRIBE_INSTRUCTIONS if task == "describe" else EXTRACT_INSTRUCTIONS
    question = phrasings[phrasing % len(phrasings)].replace("{caption}", sentence)
    if not answered:
        return question, None
    if task in ("describe", "panoptic"):
        return question, sentence if task == "describe" else panoptic_answer(nouns)
    return question, noun_answer([caption] if task == "refer" else nouns)


def build_prompt(
    tokenizer: Any,
    instruction: str,
    answer: str | None,
    *,
    num_image_tokens: int,
    system: str,
    max_length: int,
) -> Prompt:
    r"""Token ids of one exchange: `{system} USER: <image>\n{instruction} ASSISTANT: {answer}</s>`.

    Args:
        tokenizer: from `load_tokenizer`.
        instruction: the question; may not hold `<SEG>`, `<image>` or a special token.
        answer: may hold `<SEG>`. None ends the prompt after "ASSISTANT:", for generation, with all
            labels ignored; those ids are a prefix of the ids with an answer.
        num_image_tokens: how many image tokens stand for the picture.
        system: the system line; "" starts the template with "USER: ".
        max_length: most tokens allowed; without an answer one of them is kept for it. A longer
            prompt is an OverlongPrompt, a ValueError with both numbers.
    """
    specials = [t for t in tokenizer.all_special_tokens if t != SEG_TOKEN] + [IMAGE_MARK]
    _refuse(system, "system line", [*specials, SEG_TOKEN])
    _refuse(instruction, "text", [*specials, SEG_TOKEN])
    head = _encode(tokenizer, f"{system} USER: " if system else "USER: ")
    question = f"\n{instruction} ASSISTANT:"
    tail = _encode(tokenizer, question)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = [*start, *head, *[IMAGE_TOKEN_ID] * num_image_tokens, *tail]
    reply: list[int] = []
    if answer is not None:
        _refuse(answer, "answer", specials)
        joined = _encode(tokenizer, f"{question} {answer}")
        # Tokenizing both at once is what LLaVA trains on; where a merge crosses the border, the
        # ids that generation starts from must win.
        same = joined[: len(tail)] == tail
        reply = joined[len(tail) :] if same else _encode(tokenizer, f" {answer}")
        reply = [*reply, tokenizer.eos_token_id]
    length = len(prompt) + len(reply)
    fits = max_length if reply else max_length - 1
    if length > fits:
        room = "" if reply else ", with one left for the answer"
        raise OverlongPrompt(
            f"the prompt has {length} tokens ({num_image_tokens} of them image) but at most {fits} "
            f"fit{room}; shorten the caption or raise MODEL.LANGUAGE.MAX_POSITIONS"
        )
    input_ids = torch.tensor([*prompt, *reply], dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[len(prompt) :] = input_ids[len(prompt) :]
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    return Prompt(input_ids, labels, torch.nonzero(input_ids == seg_id).flatten())


def fit_prompt(
    tokenizer: Any,
    task: str,
    caption: str,
    phrases: Sequence[dict[str, Any]],
    *,
    policy: str,
    phrasing: int = 0,
    answered: bool = True,
    **limits: Any,
) -> FittedPrompt:
    """Build the prompt of a task and, where it is too long and may be cut, of a shorter caption.

    A caption whose nouns are in the answer is cut behind the last noun that fits: neither question
    nor answer holds a part of a noun, and every ``<SEG>`` has its noun. Where the answer does not
    name the nouns (a description, or an answer that is to be generated), it is cut at the end of a
    sentence, outside the nouns that are known.

    Args:
        tokenizer, task, caption, phrasing: as in `task_text` and `build_prompt`.
        phrases: per noun ``text``, ``start`` and ``end`` in `caption`; -1 where it is not in it: it
            is cut together with the noun before it.
        policy: one of `POLICIES`. "panoptic" and "refer" are never cut.
        answered: False leaves the answer to be generated.
        limits: ``num_image_tokens``, ``system`` and ``max_length`` of `build_prompt`.

    Raises:
        OverlongPrompt: it is too long and may not be cut, or does not even fit at its first cut.
        ValueError: as in the two functions, or <SEG> is no token of the tokenizer.
    """
    named = answered and task != "describe"

    def attempt(end: int, count: int) -> FittedPrompt:
        texts = caption[:end], [phrase["text"] for phrase in phrases[:count]], phrasing
        question, answer = task_text(task, *texts, answered=answered)
        prompt = build_prompt(tokenizer, question, answer, **limits)
        if named and count != len(prompt.seg_positions):
            marks = f"{len(prompt.seg_positions)} <SEG> tokens in the answer"
            raise ValueError(f"{count} nouns but {marks}; is <SEG> one token of this tokenizer?")
        return FittedPrompt(prompt, caption[:end], count, len(phrases) - count)

    try:
        return attempt(len(caption), len(phrases))
    except OverlongPrompt as error:
        if policy == "error" or task not in _CUTTABLE:
            raise
        whole = error
    cuts, fitted = _cuts(caption, phrases, at_nouns=named), None
    while cuts:  # by halving: a prompt grows with its caption
        middle = (len(cuts) - 1) // 2
        try:
            fitted = attempt(*cuts[middle])
            cuts = cuts[middle + 1 :]
        except OverlongPrompt:
            cuts = cuts[:middle]
    if fitted is None:
        unit = "noun" if named else "sentence"
        raise OverlongPrompt(f"{whole}; it does not fit either when cut behind its first {unit}")
    return fitted


def _cuts(
    caption: str, phrases: Sequence[dict[str, Any]], *, at_nouns: bool
) -> list[tuple[int, int]]:
    """Where a caption may be cut, ascending, and how many nouns lie before each place."""
    # Per noun the end of the shortest start of the caption that holds it and all nouns before it.
    # Ascending, so that the nouns of any start of the caption are the first ones.
    ends = [int(phrase["end"]) for phrase in phrases]
    first = next((int(p["end"]) for p in phrases if p["start"] >= 0), len(caption))
    reach = list(accumulate(ends, max, initial=first))[1:]
    if at_nouns:
        cuts = sorted(set(reach))
    else:
        matches = [match.end() for match in _SENTENCE_END.finditer(caption)]
        cuts = [m for m in matches if not any(p["start"] < m < p["end"] for p in phrases)]
    return [(cut, sum(r <= cut for r in reach)) for cut in cuts]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of generated token ids, with `<SEG>` kept and the other special tokens left out."""
    seg_id = tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    skipped = set(tokenizer.all_special_ids) - {seg_id}
    kept = [int(i) for i in ids if int(i) not in skipped and int(i) >= 0]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return re.sub(rf"\s*{SEG_TOKEN}", f" {SEG_TOKEN}", text).strip()


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose: a warning about the tokenizer's own longest text, which is not the limit here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _refuse(text: str, what: str, marks: Sequence[str]) -> None:
    for mark in marks:
        if mark in text:
            raise ValueError(
                f"the {what} holds {mark!r}, which the template keeps for itself: {text[:80]!r}"
            )


def _clean(noun: str) -> str:
    text = " ".join(noun.split())
    if not text:
        raise ValueError("a noun is empty; every noun needs a text")
    _refuse(text, "noun", (SEG_TOKEN, IMAGE_MARK))
    return text
