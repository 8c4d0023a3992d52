"""Greedy decoding in one small loop, for labels and short answers, without the overhead of transformers' `generate`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hdscale.bases.interface import Adaptation, Base, Encoding

FEWEST_LEFT = 3
"""With at most this many tokens left, finished rows are not dropped: copying the state of the others takes time too."""


class Decoded(NamedTuple):
    """The result of greedy decoding.

    Attributes:
        ids: token ids [B, 1 + T'], the decoder's start token first, padded after </s>.
        scores: float32 [B], the summed log-likelihood of each row's tokens, </s> included; None if not requested.
    """

    ids: Tensor
    scores: Tensor | None


def greedy_decode(
    base: Base,
    encoding: Encoding,
    adaptation: Adaptation | None,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    scored: bool = False,
    project_source: bool | None = None,
) -> Decoded:
    """The most likely token at each position until every row has ended, as transformers' greedy search gives it.

    When half of the rows have ended, only the others are continued. (The last bits of a matrix product can depend on
    how many rows it has.)

    Args:
        base: whose decoder and head are used.
        encoding: of B instances.
        adaptation: of the decoder, made by `for_generation`.
        max_new_tokens: largest number of tokens of a row, </s> included.
        min_new_tokens: number of tokens before </s> is allowed.
        scored: also compute the tokens' log-likelihoods.
        project_source: see `Base.token_decoder`.
    """
    config, device = base.config, encoding.hidden.device
    rows = encoding.hidden.shape[0]
    ids = torch.full((rows, 1 + max_new_tokens), config.pad_token_id, dtype=torch.long, device=device)
    ids[:, 0] = config.decoder_start_token_id
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    scores = torch.zeros(rows, dtype=torch.float32, device=device) if scored else None
    decoder = base.token_decoder(encoding, adaptation, max_new_tokens, project_source)
    late, flags, length = lateness(device), [], max_new_tokens
    token, places, droppable = ids[:, 0], None, True
    for step in range(max_new_tokens):
        logits = base.head(decoder(token))
        if scores is not None:
            total = torch.logsumexp(logits.float(), dim=-1)
        if step < min_new_tokens:
            logits[:, config.eos_token_id] = -torch.inf
        best, token = logits.max(dim=-1)
        token = token.masked_fill(ended, config.pad_token_id)
        if scores is not None:
            # padding does not count as a token, wherever it is
            gained = (best.float() - total).masked_fill(token == config.pad_token_id, 0.0)
            scores = scores + gained if places is None else scores.index_add(0, places, gained)
        if places is None:
            ids[:, step + 1] = token
        else:
            ids[places, step + 1] = token
        ended = ended | (token == config.eos_token_id)
        flags.append(Number((~ended).sum()))
        if len(flags) <= late:
            continue
        remaining = flags.pop(0).read()
        if remaining == 0:
            length = step + 1 - late
            break
        if droppable and 2 * remaining <= token.shape[0] and max_new_tokens - step > FEWEST_LEFT:
            rows = (~ended).nonzero().squeeze(1)
            if rows.shape[0] == 0:
                length = step + 1
                break
            droppable = decoder.keep(rows)
            if droppable:
                token, ended = token[rows], ended[rows]
                places = rows if places is None else places[rows]
    return Decoded(ids[:, : 1 + length], scores)


def lateness(device: torch.device) -> int:
    """How many tokens later the host reads the number of unfinished rows, so that a GPU always has work queued."""
    return 0 if device.type == "cpu" else 1


class Number:
    """An integer that is being copied from a device to the host."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.arrived = value, None
        if value.device.type == "cuda":
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> int:
        """Wait for the number, but not for work that was queued after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.value)
