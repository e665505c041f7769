"""Answers word by word: greedy decoding with a key-value cache, drafts, and prompts read before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_NEARLY = 3.0  # difference of logits: a twentieth of the probability


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a causal language model has read of prompts that begin alike, image tokens included.

    Attributes:
        ids: int64 (N,) on the CPU, the tokens; image placeholders are negative.
        keys_values: per layer the keys and the values, (1, heads, N, head width) each. They are
            only ever read: passes work on copies.
    """

    ids: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]

    def rest(self, ids: Tensor) -> Tensor:
        """What follows in a prompt (L,) that begins so, (L - N,).

        Raises:
            ValueError: the prompt begins otherwise, ends here, or has another image behind it.
        """
        count = len(self.ids)
        if not torch.equal(ids[:count].cpu(), self.ids):
            raise ValueError(
                f"A prompt of {len(ids)} tokens does not begin with the {count} tokens that were "
                "read of its image: both must come from the same config"
            )
        rest = ids[count:]
        if not len(rest) or bool((rest < 0).any()):
            raise ValueError(
                f"A prompt of {len(ids)} tokens must go on in words behind the {count} tokens that "
                "were read of its image"
            )
        return rest


def read_prefix(model: Any, embeds: Tensor, ids: Tensor) -> list[Prefix] | None:
    """Read the same tokens for several images.

    Args:
        model: a decoder of transformers without its output layer.
        embeds: (B, N, D) embeddings; they differ at the image tokens.
        ids: (N,) int64.

    Returns:
        one prefix per image; None for an architecture that keeps more of what it read than keys and
        values: its prompts are read anew each time.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kinds = DynamicCache(config=model.config).layers
    if not all(isinstance(kind, DynamicLayer) for kind in kinds):
        return None
    cache = DynamicCache()
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    # A slice would keep the whole batch alive.
    return [
        Prefix(
            ids.cpu(),
            tuple((x.keys[i : i + 1].clone(), x.values[i : i + 1].clone()) for x in cache.layers),
        )
        for i in range(len(embeds))
    ]


def joined_cache(prefixes: Sequence[Prefix]) -> Any:
    """A cache of transformers that holds the prefixes of a batch, all of one length, as copies."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, parts in enumerate(zip(*(prefix.keys_values for prefix in prefixes))):
        keys, values = (torch.cat(tensors) for tensors in zip(*parts))  # B heads N width
        cache.update(keys, values, layer)
    return cache


class Choices(Protocol):
    """What may be said next in one answer; it goes through the answer once, token by token."""

    allowed: Callable[[], list[list[int]]]  # token ids, ascending; the earlier lists come first
    append: Callable[[int], None]  # takes note of the token that was chosen


def best_token(logits: Tensor, choices: Choices | None) -> int:
    """The most probable token of (V,) logits; with choices the one that comes next.

    That is the same one where it is allowed. Where not, the most probable of the others may skip a
    part of the text, which cannot come any more: the first list counts that has a token nearly as
    probable.
    """
    best = int(logits.argmax())
    if choices is not None:
        lists = choices.allowed()
        allowed = sorted(set().union(*lists))
        if best not in allowed:
            scores = dict(zip(allowed, logits[allowed].tolist()))
            least = max(scores.values()) - _NEARLY
            near = [[token for token in tokens if scores[token] >= least] for tokens in lists]
            best = max(next(filter(None, near)), key=scores.__getitem__)
        choices.append(best)
    return best


def greedy(
    model: Any,
    embeds: Tensor,
    attention_mask: Tensor,
    cache: Any = None,
    choices: Sequence[Choices | None] = (),
    **options: Any,
) -> list[Tensor]:
    """Decode a batch greedily.

    Args:
        model: a causal language model of transformers.
        embeds: (B, L, D) embeddings of the prompts, padded on the left.
        attention_mask: (B, N + L) int64, 0 at the padding.
        cache: the N tokens that were read before the prompts; it is used up. None: none were.
        choices: per sample what may be said; None, or none at all: anything.
        options: of transformers' ``generate``: ``max_new_tokens``, ``eos_token_id``,
            ``pad_token_id`` and, of a single prompt, ``streamer``.

    Returns:
        per sample (T_i,) int64: the new tokens, with the end token if it came.
    """
    if cache is not None:
        # The library wants embeddings of all tokens and cuts off those that the cache holds.
        embeds = nn.functional.pad(embeds, (0, 0, cache.get_seq_length(), 0))
        options["past_key_values"] = cache
    if any(choice is not None for choice in choices):
        options["logits_processor"] = [partial(_choose, choices)]
    answers = model.generate(
        inputs_embeds=embeds, attention_mask=attention_mask, do_sample=False, **options
    )
    trimmed = []
    for answer in answers:
        ends = (answer == options["eos_token_id"]).nonzero()
        trimmed.append(answer[: int(ends[0]) + 1] if len(ends) else answer)
    return trimmed


def _choose(choices: Sequence[Choices | None], input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor of transformers, called once per token of a batch: scores are (B, V)."""
    for row, choice in zip(scores, choices):
        if choice is not None:
            best = best_token(row, choice)
            row.fill_(-torch.inf)[best] = 0.0
    return scores


class Drafts:
    """Proposes what an answer says next, by looking its last word up (prompt lookup).

    Two texts are searched. `snippets` are pieces that answers are made of: the first one that has
    the word gives what follows it there. Then the prompt, whose words come back in its order: what
    follows the word's first occurrence behind the place of the last copy, or its first at all.
    Looking up in this order takes fewer calls than looking for the first repetition anywhere, as
    transformers does: words such as "the" are everywhere, and a template repeats itself nowhere in
    its prompt (docs/RESULTS.md).
    """

    def __init__(self, prompt: Sequence[int], snippets: Sequence[Sequence[int]] = ()) -> None:
        """Remember where to look.

        Args:
            prompt: token ids of the prompt, without image placeholders.
            snippets: token ids of pieces of answers; the earlier ones count first.
        """
        self._prompt, self._snippets = list(prompt), [list(snippet) for snippet in snippets]
        self._cursor = 0  # in the prompt, behind the last copy
        self._proposed = (0, 0)  # how many words came from snippets; where the copy began

    def propose(self, last: int, limit: int) -> list[int]:
        """Words that may follow the word `last`, at most `limit`; may be none."""
        continuation: list[int] = []
        for snippet in self._snippets:
            if last in snippet[:-1]:
                continuation = snippet[snippet.index(last) + 1 :]
                break
        word = continuation[-1] if continuation else last
        start = self._behind(word, self._cursor) or self._behind(word, 0)
        self._proposed = (len(continuation), start)
        copied = self._prompt[start:] if start else []
        return (continuation + copied)[:limit]

    def accept(self, count: int) -> None:
        """Say how many words of the last proposal were right."""
        from_snippet, start = self._proposed
        if start and count > from_snippet:
            self._cursor = start + count - from_snippet

    def _behind(self, word: int, start: int) -> int:
        # 0 stands for nowhere: it is behind no word.
        return self._prompt.index(word, start) + 1 if word in self._prompt[start:] else 0


def with_drafts(
    model: Any,
    embeds: Tensor,
    drafts: Drafts,
    cache: Any = None,
    choices: Choices | None = None,
    *,
    num_drafted: int,
    max_new_tokens: int,
    eos_token_id: int,
    streamer: Any = None,
) -> Tensor:
    """Decode one prompt greedily, several tokens a pass where the drafts are right.

    One pass of the model checks a whole proposal: the tokens before the first wrong one stay, and
    the pass itself gives the token after them. The answer is that of :func:`greedy` (up to
    rounding: several positions are computed at once, and a tie may fall the other way).

    Args:
        embeds: (1, L, D) embeddings of the prompt.
        num_drafted: the longest proposal of `drafts`.
        streamer: an object of transformers (``put``, ``end``) that gets the tokens as they come.
            Its first ``put`` is the prompt's, so make it with ``skip_prompt=True``.
        choices: what may be said; None: anything.
        model, cache, max_new_tokens, eos_token_id: see :func:`greedy`. No pass reaches beyond
            ``L + max_new_tokens`` positions behind what the cache holds.

    Returns:
        (T,) int64: the new tokens, with the end token if it came.
    """
    from transformers import DynamicCache

    cache = DynamicCache() if cache is None else cache
    head = model.get_output_embeddings()
    hidden = model.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    answer = [best_token(head(hidden.last_hidden_state[0, -1]), choices)]
    if streamer is not None:
        streamer.put(torch.empty(1, 0, dtype=torch.int64))
        streamer.put(torch.tensor(answer))
    while answer[-1] != eos_token_id and len(answer) < max_new_tokens:
        # One token of what is left comes from the pass itself.
        proposed = drafts.propose(answer[-1], min(num_drafted, max_new_tokens - len(answer) - 1))
        ids = torch.tensor([[answer[-1], *proposed]], device=embeds.device)
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        new: list[int] = []
        for logits, drafted in zip(head(hidden.last_hidden_state[0]), [*proposed, None]):
            new.append(best_token(logits, choices))
            if new[-1] != drafted or new[-1] == eos_token_id:
                break
        drafts.accept(len(new) - 1)
        answer += new
        wrong = 1 + len(proposed) - len(new)
        if wrong:  # all that was read is in the cache; the answer's last token was not read yet
            cache.crop(-wrong)
        if streamer is not None:
            streamer.put(torch.tensor(new))
    if streamer is not None:
        streamer.end()
    return torch.tensor(answer, dtype=torch.int64, device=embeds.device)
