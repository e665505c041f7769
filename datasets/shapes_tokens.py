"""The tokenizer of the synthetic shapes: a small byte-level BPE in the tokenizers' own format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

from gella.text.prompts import (
    DESCRIBE_INSTRUCTIONS,
    EXTRACT_INSTRUCTIONS,
    SEG_TOKEN,
    noun_answer,
    panoptic_answer,
)
from gella.text.words import number_in_words

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY_SIZE = 639  # MODEL.LANGUAGE.VOCAB_SIZE of the tiny config less one, for <SEG>
_MAX_ANSWER_NOUNS = 20  # number words that get a token of their own


def template_texts() -> list[str]:
    """Texts of the prompts themselves: instructions, roles, number words and answer templates."""
    # An answer without its <SEG>, which is a token of its own and never split.
    answers = [noun_answer(["thing"] * 2), noun_answer(["thing"]), panoptic_answer(["thing"] * 3)]
    return [
        *DESCRIBE_INSTRUCTIONS,
        *(text.replace("{caption}", "") for text in EXTRACT_INSTRUCTIONS),
        "USER: ASSISTANT:",
        *(text.replace(f" {SEG_TOKEN}", "") for text in answers),
        " " + " ".join(number_in_words(n) for n in range(1, _MAX_ANSWER_NOUNS + 1)),
    ]


def train_tokenizer(captions: Sequence[str], folder: str) -> int:
    """Train on captions and the prompts' own texts and write a folder that AutoTokenizer reads.

    Every word of the captions, with its leading space, becomes one token, so does every word of
    the prompts for which there is room; any other text falls back to pieces and at worst to bytes,
    so every unicode text survives a round trip. The vocabulary has exactly `VOCABULARY_SIZE`
    entries; unused places are filled with reserved tokens, so that the size is a constant.

    Args:
        captions: the training captions.
        folder: where to write; made if missing.

    Returns:
        The number of tokens, always `VOCABULARY_SIZE`.

    Raises:
        ValueError: the captions have more words than the vocabulary has room for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Frequent words are merged first, so captions are weighed above the templates.
    words = _weighted_words(captions, template_texts())
    tokenizer.train_from_iterator(words, trainer)
    missing = VOCABULARY_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<reserved_{n}>" for n in range(missing)])
    for word in sorted({w for caption in captions for w in re.findall(r" [A-Za-z]+", caption)}):
        pieces = tokenizer.encode(word).tokens
        if len(pieces) != 1:
            raise ValueError(
                f"the word '{word}' takes {len(pieces)} tokens; the captions have too many words "
                f"for VOCABULARY_SIZE {VOCABULARY_SIZE}: raise it with MODEL.LANGUAGE.VOCAB_SIZE"
            )
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    _write_settings(folder)
    return tokenizer.get_vocab_size()


def _weighted_words(captions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Words with their leading space, caption words repeated so that their merges come first."""
    pattern = re.compile(r" ?[A-Za-z]+|'t| ?[^A-Za-z\s]+|\s+")
    seen = dict.fromkeys(w for text in captions for w in pattern.findall(text))
    also = dict.fromkeys(w for text in templates for w in pattern.findall(text))
    often = [word for word in seen for _ in range(100)]
    return often + [word for word in also for _ in range(10)]


def _write_settings(folder: str) -> None:
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "model_max_length": 2048,
        **names,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=1)
    with open(os.path.join(folder, "special_tokens_map.json"), "w", encoding="utf-8") as file:
        json.dump(names, file, indent=1)
