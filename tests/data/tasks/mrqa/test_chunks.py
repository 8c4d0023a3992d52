"""Cutting contexts into windows: properties under random documents, and the odd cases by name."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hdscale.data.tasks.mrqa.chunks import chunks_of_questions, cut, rescue
from hdscale.data.tasks.mrqa.question import Question, prompt_before_context
from hdscale.data.tokenize import load_tokenizer
from hdscale.errors import UserError
from tests.helpers.evaluation_jobs import WORDS, word_tokenizer
from tests.helpers.places import DATA

TEMPLATE = "question: {question} context: {context}"


@pytest.fixture(scope="module", params=["words", "t5"])
def tokenizer(request):
    if request.param == "words":
        return word_tokenizer()
    if not (DATA / "t5_tokenizer").is_dir():
        pytest.skip(f"no T5 vocabulary in {DATA}; set HDSCALE_TEST_DATA")
    return load_tokenizer(str(DATA / "t5_tokenizer"))


def question_of(context: str, spans: tuple = (), question: str = "who sat ?", id: str = "q") -> Question:
    prompt = prompt_before_context(TEMPLATE, question)
    return Question(
        prompt + context,
        "",
        "squad",
        id,
        ("gold",),
        qid=id,
        question=question,
        begin=10,
        context=context,
        spans=tuple(spans),
    )


def chunks(question: Question, tokenizer, window: int = 40, overlap: int = 8, training: bool = False):
    return list(chunks_of_questions([question], tokenizer, window, overlap, training))


def context_tokens(question: Question, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and character ranges of the context, from a tokenisation of the whole prompt."""
    border = len(question.source) - len(question.context)
    encoded = tokenizer(question.source, add_special_tokens=False, return_offsets_mapping=True)
    kept = [(i, o) for i, o in zip(encoded.input_ids, encoded.offset_mapping, strict=True) if o[1] > border]
    return [i for i, _ in kept], [(max(0, a - border), b - border) for _, (a, b) in kept]


PIECES = [
    *WORDS,
    "½",
    "é",
    "e\u0301",
    "😀",
    "Περί",
    "ﷺ",
    "naïve-looking",
    "\u200b",
    "\n",
    "\t",
    "a\u00a0b",
    "123,456.78",
    "(“x”)",
    "\x07",
]
documents = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["", " ", "  ", "\n"])), max_size=90).map(
    lambda pairs: "".join(piece + space for piece, space in pairs)
)


@st.composite
def documents_with_spans(draw):
    context = draw(documents)
    spans = []
    if context:
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, len(context) - 1))
            last = min(len(context) - 1, first + draw(st.integers(0, 60)))
            spans.append((first, last))
    return context, spans


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(("naïve-looking ﷺ", [(13, 14)]), 24, 6, False)
@given(documents_with_spans(), st.integers(24, 60), st.integers(0, 12), st.booleans())
def test_properties_of_chunks(tokenizer, document, window, overlap, training):
    context, spans = document
    question = question_of(context, spans)
    ids, offsets = context_tokens(question, tokenizer)
    prompt = tokenizer(question.source, add_special_tokens=False).input_ids[: -len(ids) or None]
    room = window - 1 - len(prompt)
    shared = min(overlap, room // 2)
    found = chunks(question, tokenizer, window, overlap, training)
    assert found

    pieces = []
    for number, chunk in enumerate(found):
        assert chunk.id == f"q#{number}" and chunk.group == "q" and chunk.references == ("gold",)
        assert len(chunk.input_ids) <= window, "no chunk exceeds the window"
        assert list(chunk.input_ids[: len(prompt)]) == prompt and chunk.input_ids[-1] == tokenizer.eos_token_id
        assert chunk.source == question.source[: len(question.source) - len(context)] + context[chunk.start : chunk.end]
        pieces.append(list(chunk.input_ids[len(prompt) : -1]))

    # regular windows come first; walk them: each begins `shared` tokens before the end of the one before
    position, regular = 0, 0
    for piece in pieces:
        begin = position - shared if regular else 0
        assert piece == ids[begin : begin + len(piece)]
        position = begin + len(piece)
        regular += 1
        if position >= len(ids):
            break
        assert len(piece) == room, "only the last window may be short"
    assert position == len(ids), "every context token lies in some chunk"
    assert found[0].start == 0 and found[regular - 1].end == len(context)
    assert all(
        later.start <= earlier.end for earlier, later in zip(found[: regular - 1], found[1:regular], strict=True)
    )
    assert training or regular == len(pieces)

    # characters of a window are those of its tokens, to the next token's first
    position = 0
    for piece, chunk in zip(pieces[:regular], found[:regular], strict=True):
        begin = position - shared if position else 0
        position = begin + len(piece)
        assert chunk.start == (offsets[begin][0] if begin else 0)
        assert chunk.end == (max(offsets[position][0], chunk.start) if position < len(ids) else len(context)) or (
            offsets[position - 1][1] == chunk.end > offsets[position][0]
        )

    for first, last in spans:
        low = sum(end <= first for _, end in offsets)
        high = sum(start <= last for start, _ in offsets)
        low = min(low, high - 1)
        if not 0 <= low < high:
            continue  # characters that no token covers
        first = max(first, offsets[low][0])  # white space and the like at its beginning are not part of the answer
        held = [chunk for chunk in found if chunk.start <= first and last < chunk.end]
        if high - low <= shared or (training and high - low <= room):
            assert held, "every span that fits is found in some chunk"
            assert any(chunk.target for chunk in held)
    for chunk in found:
        if chunk.target:
            assert any(
                context[first : last + 1].endswith(chunk.target)
                and chunk.start <= last + 1 - len(chunk.target)
                and last < chunk.end
                for first, last in spans
            )


@given(st.integers(0, 300), st.integers(2, 40), st.integers(0, 20))
def test_windows_cover_and_overlap(tokens, room, overlap):
    overlap = min(overlap, room // 2)
    windows = cut(tokens, room, overlap)
    assert windows[0][0] == 0 and windows[-1][1] == tokens
    assert all(0 < stop - begin <= room for begin, stop in windows) or (tokens == 0 and windows == [(0, 0)])
    assert all(left[1] - right[0] == overlap for left, right in zip(windows, windows[1:], strict=False))


@given(st.integers(1, 200), st.integers(4, 40), st.data())
def test_rescued_windows_hold_what_was_cut(tokens, room, data):
    windows = cut(tokens, room, room // 4)
    low = data.draw(st.integers(0, tokens - 1))
    high = data.draw(st.integers(low + 1, tokens))
    added = rescue(windows, [(low, high)], tokens, room)
    inside = lambda pairs: any(begin <= low and high <= stop for begin, stop in pairs)  # noqa: E731
    assert inside(windows + added) == (high - low <= room or inside(windows))
    assert all(0 <= begin < stop <= tokens and stop - begin <= room for begin, stop in added)
    assert not added or not inside(windows), "no window is added needlessly"


def test_a_short_context_is_one_chunk_that_equals_its_plain_tokenisation(tokenizer):
    question = question_of("cat sat on mat .", [(4, 6)])
    (chunk,) = chunks(question, tokenizer)
    assert list(chunk.input_ids) == tokenizer(question.source).input_ids
    assert (chunk.target, chunk.source) == ("sat", question.source)


def test_an_empty_context_gives_one_chunk_with_the_prompt_alone(tokenizer):
    for context in ("", " \n"):
        (chunk,) = chunks(question_of(context), tokenizer)
        assert (chunk.target, chunk.start, chunk.end) == ("", 0, len(context))
        assert list(chunk.input_ids) == tokenizer("question: who sat ? context:").input_ids


def test_a_prompt_longer_than_the_window_loses_the_end_of_its_question(tokenizer):
    question = question_of("cat sat on mat . " * 20, question="who ran far " * 50 + "away ?")
    found = chunks(question, tokenizer, window=40)
    assert len(found) > 1
    head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in ("question: who ran far", "context:"))
    for chunk in found:
        assert len(chunk.input_ids) <= 40
        assert list(chunk.input_ids[: len(head)]) == head
        # a quarter of the window is left to the context
        assert list(chunk.input_ids[29 - len(tail) : 29]) == tail


def test_a_window_smaller_than_the_template(tokenizer):
    with pytest.raises(UserError, match="leaves no room beside the template"):
        chunks(question_of("cat", question="who"), tokenizer, window=4)


def test_an_answer_across_a_border_is_found_whole_in_a_neighbour(tokenizer):
    words = ["cat", "dog", "sat", "hat"] * 30
    context = " ".join(words)
    width = len("cat ")
    for word in range(len(words) - 3):
        first, last = word * width, (word + 3) * width - 2
        found = chunks(question_of(context, [(first, last)]), tokenizer, window=40, overlap=10)
        holding = [chunk for chunk in found if chunk.target]
        assert holding, f"word {word}"
        for chunk in found:
            assert bool(chunk.target) == (chunk.start <= first and last < chunk.end)
            assert chunk.target in ("", context[first : last + 1])


def test_the_first_detected_answer_in_a_chunk_is_its_target(tokenizer):
    context = "red cat " + "sat on mat " * 20 + "blue dog"
    blue, red = (context.index("blue"), context.index("blue") + 3), (0, 2)
    found = chunks(question_of(context, [blue, red]), tokenizer)
    assert [chunk.target for chunk in found if chunk.target] == ["red", "blue"]
    (whole,) = chunks(question_of(context, [blue, red]), tokenizer, window=400)
    assert whole.target == "blue"


def test_unicode_offsets_count_code_points(tokenizer):
    context = "😀😀 ½ naïve e\u0301tude Περί 𝒳 end"
    for word in context.split():
        first = context.index(word)
        (chunk,) = chunks(question_of(context, [(first, first + len(word) - 1)]), tokenizer, window=200)
        assert chunk.target == word


def test_only_training_adds_windows_for_long_answers(tokenizer):
    context = "cat sat on mat . " * 12
    long_answer = (len("cat sat on mat . ") * 5, len("cat sat on mat . ") * 8 - 2)
    question = question_of(context, [long_answer])
    regular = chunks(question, tokenizer, window=40, overlap=4)
    trained = chunks(question, tokenizer, window=40, overlap=4, training=True)
    assert not any(chunk.target for chunk in regular)
    assert trained[: len(regular)] == regular and len(trained) == len(regular) + 1
    assert trained[-1].target == context[long_answer[0] : long_answer[1] + 1]


def test_a_tokenizer_without_offsets():
    from transformers import ByT5Tokenizer

    with pytest.raises(UserError, match="ByT5Tokenizer does not map tokens to characters"):
        chunks(question_of("cat"), ByT5Tokenizer())


def test_questions_keep_their_order_over_several_rounds_of_tokenisation(tokenizer):
    asked = [question_of("cat sat on mat . " * (number % 12), id=str(number)) for number in range(600)]
    found = list(chunks_of_questions(asked, tokenizer, 40, 8, training=False))
    assert list(dict.fromkeys(chunk.group for chunk in found)) == [str(number) for number in range(600)]
