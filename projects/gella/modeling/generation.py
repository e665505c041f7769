"""Greedy answers from input embeddings, with a key-value cache; optionally with drafts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


def greedy(
    model: Any,
    embeds: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    streamer: Any = None,
    cache: Any = None,
) -> list[Tensor]:
    """Decode a batch greedily.

    Args:
        model: a causal language model of transformers.
        embeds: (B, L, D) embeddings of the prompts, padded on the left.
        attention_mask: (B, L) int64, 0 at the padding; (B, N + L) behind N tokens in the cache.
        max_new_tokens: the longest answer, its end token included.
        eos_token_id: ends an answer.
        pad_token_id: fills the answers that end before the last one does.
        streamer: see :func:`with_drafts`.
        cache: what was read before the prompts; it is used up. None: nothing.

    Returns:
        per sample (T_i,) int64: the new tokens, with the end token if it came.
    """
    options = {}
    if cache is not None:
        # The library wants embeddings of all tokens and cuts off those that the cache holds.
        embeds = nn.functional.pad(embeds, (0, 0, cache.get_seq_length(), 0))
        options["past_key_values"] = cache
    answers = model.generate(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        streamer=streamer,
        **options,
    )
    return [_through_end(answer, eos_token_id) for answer in answers]


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
        self._place = 0  # in the prompt, behind the last copy
        self._proposed = (0, 0)  # how many words came from snippets; where the copy began

    def propose(self, last: int, limit: int) -> list[int]:
        """Words that may follow the word `last`, at most `limit`; may be none."""
        found: list[int] = []
        for snippet in self._snippets:
            if last in snippet[:-1]:
                found = snippet[snippet.index(last) + 1 :]
                break
        word = found[-1] if found else last
        start = self._behind(word, self._place) or self._behind(word, 0)
        self._proposed = (len(found), start)
        copied = self._prompt[start:] if start else []
        return (found + copied)[:limit]

    def accept(self, count: int) -> None:
        """Say how many words of the last proposal were right."""
        from_snippet, start = self._proposed
        if start and count > from_snippet:
            self._place = start + count - from_snippet

    def _behind(self, word: int, start: int) -> int:
        # 0 stands for nowhere: it is behind no word.
        try:
            return self._prompt.index(word, start) + 1
        except ValueError:
            return 0


def with_drafts(
    model: Any,
    embeds: Tensor,
    drafts: Drafts,
    *,
    num_drafted: int,
    max_new_tokens: int,
    eos_token_id: int,
    streamer: Any = None,
    cache: Any = None,
) -> Tensor:
    """Decode one prompt greedily, several tokens a pass where the drafts are right.

    One pass of the model checks a whole proposal: the tokens before the first wrong one stay, and
    the pass itself gives the token after them. The answer is that of :func:`greedy` (up to
    rounding: several positions are computed at once, and a tie may fall the other way).

    Args:
        embeds: (1, L, D) embeddings of the prompt.
        drafts: proposes tokens.
        num_drafted: the longest proposal.
        streamer: an object of transformers (``put``, ``end``) that gets the tokens as they come.
            Its first ``put`` is the prompt's, so make it with ``skip_prompt=True``.
        cache: what was read before the prompt; it is used up. None: nothing.
        model, max_new_tokens, eos_token_id: see :func:`greedy`. No pass reaches beyond
            ``L + max_new_tokens`` positions behind what the cache holds.

    Returns:
        (T,) int64: the new tokens, with the end token if it came.
    """
    if cache is None:
        cache = _empty_cache()
    head = model.get_output_embeddings()
    hidden = model.base_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    answer = [int(head(hidden.last_hidden_state[0, -1]).argmax())]
    if streamer is not None:
        streamer.put(torch.empty(1, 0, dtype=torch.int64))
        streamer.put(torch.tensor(answer))
    while answer[-1] != eos_token_id and len(answer) < max_new_tokens:
        # One token of what is left comes from the pass itself.
        proposed = drafts.propose(answer[-1], min(num_drafted, max_new_tokens - len(answer) - 1))
        ids = torch.tensor([[answer[-1], *proposed]], device=embeds.device)
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        best = head(hidden.last_hidden_state[0]).argmax(-1).tolist()
        right = 0
        while right < len(proposed) and proposed[right] == best[right]:
            right += 1
        drafts.accept(right)
        new = best[: right + 1]
        if eos_token_id in new:
            new = new[: new.index(eos_token_id) + 1]
        answer += new
        wrong = 1 + len(proposed) - len(new)
        if wrong:  # all that was read is in the cache; the answer's last token was not read yet
            cache.crop(-wrong)
        if streamer is not None:
            streamer.put(torch.tensor(new))
    if streamer is not None:
        streamer.end()
    return torch.tensor(answer, dtype=torch.int64, device=embeds.device)


def _empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def before_end(answer: Tensor, limit: int, eos_token_id: int) -> Tensor:
    """An answer without its end token; one that has none was cut off at `limit`: a warning."""
    if len(answer) and int(answer[-1]) == eos_token_id:
        return answer[:-1]
    _logger.warning(
        "an answer was cut off after %d tokens: MODEL.LANGUAGE.MAX_NEW_TOKENS or MAX_POSITIONS "
        "allows no more",
        limit,
    )
    return answer


def _through_end(answer: Tensor, eos_token_id: int) -> Tensor:
    ends = (answer == eos_token_id).nonzero()
    return answer[: int(ends[0]) + 1] if len(ends) else answer
