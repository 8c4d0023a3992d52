"""Cutting question and context into windows of tokens (Section 3.1.2).

A window consists of the prompt, some tokens of the context and `</s>`, at most `window` in all; neighbours share
`overlap` context tokens. The cuts are those of one tokenisation of the whole prompt, mapped to characters by
the offsets of a fast tokenizer.

How oddities are handled:
- a prompt that leaves less than a quarter of the window to the context loses the end of its question;
- the overlap is at most half of what the window leaves to the context, so that every window moves on;
- an empty context gives one window with the prompt alone;
- an answer across a window's border is not found in it. If it has at most `overlap` tokens, a neighbouring window has
  all of it; a longer one that no window has gets, in training only, a window of its own, if it fits into one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from hdscale.data.task import Example
from hdscale.data.tasks.mrqa.question import Question
from hdscale.errors import UserError

READ_AHEAD = 256
"""Questions tokenised at once (the tokenizer has its own threads)."""


@dataclass(frozen=True, slots=True)
class Chunk(Example):
    """A question with a part of its context: `context[start:end]`; `target` is the answer found there, or the
    empty string.

    `input_ids` are the window's tokens, prompt and `</s>` included, never more than the window. `group` is
    the question's id, `id` is `<question id>#<number of the chunk>`.
    """

    start: int = 0
    end: int = 0


def chunks_of_questions(
    questions: Iterable[Question], tokenizer: Any, window: int, overlap: int, training: bool
) -> Iterator[Chunk]:
    """The chunks of all questions, in order.

    Args:
        tokenizer: a fast tokenizer of transformers (it knows offsets).
        window: tokens of a chunk, prompt and `</s>` included.
        overlap: context tokens that neighbouring chunks share.
        training: add windows for answers that the regular ones cut.

    Raises:
        UserError: a tokenizer without offsets, a window too small for the template.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not map tokens to characters, which cutting contexts needs; "
            "use a model with a fast tokenizer"
        )
    stream, blank = iter(questions), blank_token(tokenizer)
    while group := list(islice(stream, READ_AHEAD)):
        encoded = tokenizer(
            [question.source for question in group],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for question, ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield from chunks_of(
                question,
                ids,
                offsets,
                window,
                overlap,
                training,
                end_id=tokenizer.eos_token_id,
                blank_id=blank,
            )


def chunks_of(
    question: Question,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    window: int,
    overlap: int,
    training: bool,
    *,
    end_id: int,
    blank_id: int | None,
) -> Iterator[Chunk]:
    """The chunks of one question, from the tokens of its whole prompt and their character ranges."""
    border = len(question.source) - len(question.context)
    # offsets never go back for the tokenizers known; two tokens may share a character (½ -> 1, /, 2)
    starts = list(accumulate((first for first, _ in offsets), max))
    ends = list(accumulate((last for _, last in offsets), max))
    first_token = bisect_right(ends, border)
    prompt = cut_prompt(question, list(ids[:first_token]), starts[:first_token], window)
    room = window - len(prompt) - 1
    context_ids = ids[first_token:]
    token_starts = [max(0, start - border) for start in starts[first_token:]]
    covered = (
        # a separate space gets the offsets of the next word's first letter, which it does not cover
        start if token == blank_id else end - border
        for token, start, end in zip(context_ids, token_starts, ends[first_token:], strict=True)
    )
    token_ends = list(accumulate(covered, max))
    # (first and last character, [first, end) token); what no token covers at its beginning is left off
    answers = []
    for first, last in question.spans:
        tokens = tokens_of((first, last), token_starts, token_ends)
        if tokens is not None:
            answers.append(((max(first, token_starts[tokens[0]]), last), tokens))
    windows = cut(len(context_ids), room, min(overlap, room // 2))
    if training:
        windows += rescue(windows, [tokens for _, tokens in answers], len(context_ids), room)
    for number, (begin, stop) in enumerate(windows):
        start = 0 if begin == 0 else token_starts[begin]
        # up to the next token: characters that no token covers (a separate accent, white space) stay with
        # the one before
        end = len(question.context) if stop == len(context_ids) else max(token_starts[stop], token_ends[stop - 1])
        inside = [span for span, (low, high) in answers if begin <= low and high <= stop]
        yield Chunk(
            source=question.source[:border] + question.context[start:end],
            target=question.context[inside[0][0] : inside[0][1] + 1] if inside else "",
            task=question.task,
            id=f"{question.id}#{number}",
            references=question.references,
            group=question.id,
            input_ids=(*prompt, *context_ids[begin:stop], end_id),
            start=start,
            end=end,
        )


def blank_token(tokenizer: Any) -> int | None:
    """The id of SentencePiece's space that stands alone; None where the vocabulary has none."""
    found = tokenizer.convert_tokens_to_ids("▁")
    return None if found == tokenizer.unk_token_id else found


def cut(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [begin, stop) of at most `room` that cover `tokens`, each sharing `overlap` with the one
    before.

    One empty window for no tokens at all.
    """
    windows = [(0, min(room, tokens))]
    while windows[-1][1] < tokens:
        begin = windows[-1][1] - overlap
        windows.append((begin, min(begin + room, tokens)))
    return windows


def rescue(
    windows: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]], tokens: int, room: int
) -> list[tuple[int, int]]:
    """Further windows for token ranges that fit a window but lie whole in none, each in the middle of its
    own.
    """
    added: list[tuple[int, int]] = []
    for low, high in found:
        held = any(begin <= low and high <= stop for begin, stop in [*windows, *added])
        if not held and high - low <= room:
            begin = max(0, min(low - (room - (high - low)) // 2, tokens - room))
            added.append((begin, min(begin + room, tokens)))
    return added


def tokens_of(span: tuple[int, int], starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int] | None:
    """Tokens [low, high) that cover the characters of a span (its end inclusive); None if no token covers any
    of it.
    """
    first, last = span
    low, high = bisect_right(ends, first), bisect_right(starts, last)
    # a span may begin in characters without a token (a combining accent): the token before covers them
    low = min(low, high - 1)
    return (low, high) if 0 <= low < high else None


def cut_prompt(question: Question, prompt: list[int], starts: Sequence[int], window: int) -> list[int]:
    """The prompt's tokens, the end of the question left out where less than a quarter of the window would
    remain for context.
    """
    most = window - 1 - max(1, window // 4)
    excess = len(prompt) - most
    if excess <= 0:
        return prompt
    begin = question.begin
    low, high = bisect_left(starts, begin), bisect_left(starts, begin + len(question.question))
    if high - low < excess:
        raise UserError(
            f"data.max_source_length={window} leaves no room beside the template of task {question.task}; raise it"
        )
    return prompt[: high - excess] + prompt[high:]
