"""Train the tokenizer of the embedded default: a small sentencepiece unigram vocabulary in T5's layout.

Ids are those of T5: `<pad>` 0, `</s>` 1, `<unk>` 2, the pieces, and the sentinels last with `<extra_id_0>`
at the very end. Every printable ASCII character is a piece, and a digit is one piece wherever it stands, so
that `2` and `3.8` are short.
"""

from __future__ import annotations

import io
import math
import re
import string
from collections import Counter
from itertools import islice

import sentencepiece
from transformers import T5Tokenizer

from hdscale.data.tasks.quickstart.language import documents

SENTINELS = 40
"""Sentinel tokens: more than span corruption of the longest paragraph needs."""

DIGIT_SCORE = -5.0
"""Log-probability of a digit's piece; any value above that of two pieces in its place does."""

HEADINGS = "sentence: sentence1: sentence2: premise: hypothesis: sentiment entailment paraphrase similarity"
"""Words of the task formats, which the language itself hardly uses."""


def train_tokenizer(seed: int | str, paragraphs: int = 20000, pieces: int = 1000) -> T5Tokenizer:
    """A fast T5 tokenizer for the generated language; `pieces` is an upper bound.

    The digits are kept out of sentencepiece's sample and added as pieces of their own, bare and after a
    space.
    """
    text = (re.sub(r"[0-9]+", " ", paragraph) for paragraph in islice(documents(f"{seed} tokenizer"), paragraphs))
    sample = [*text, *[HEADINGS] * (paragraphs // 40)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace) - set(string.digits))),
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(trained.id_to_piece(i), trained.get_score(i)) for i in range(3, trained.vocab_size())]
    vocabulary += whole_words(sample, known={piece for piece, _ in vocabulary})
    vocabulary += [(space + digit, DIGIT_SCORE) for space in ("", "▁") for digit in string.digits]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS, model_max_length=512)


def whole_words(sample: list[str], known: set[str], at_least: int = 20) -> list[tuple[str, float]]:
    """Pieces (with log-probabilities) for frequent whole words that `known` would cut up.

    Where a short word is also the end of longer ones, unigram training prefers `▁` + `at` to `▁at`; in text
    as small as this every such word lengthens every sentence.
    """
    counts = Counter("▁" + word for line in sample for word in re.findall(r"[A-Za-z]+", line))
    total = counts.total()
    return [
        (piece, math.log(count / total))
        for piece, count in counts.most_common()
        if count >= at_least and piece not in known
    ]
