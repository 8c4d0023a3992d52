"""What a base is to the rest of the package, and the hooks by which an `Adaptation` changes it.

Methods, training, decoding, analysis and benchmarks use nothing of a base but `Base`. A new family of bases is one file
with a subclass, one entry in `hdscale.bases.families`, and one row in the tests.

Conditioning is an explicit argument and never an attribute of a module: activation checkpointing then recomputes with
the same adapters, and beams, threads and micro-batches share no state.

Shapes: B batch, S source, T target, D d_model, A adapter size, K hypernetwork bottleneck. R is the number of decoder
rows: B, or B times the number of beams, with the beams of an instance adjacent. N is the number of tokens of a pass:
the tokens of a row are adjacent, and so are the rows of an instance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PretrainedConfig

from hdscale.requirements import require

require("torch", "transformers")


class LinearShape(NamedTuple):
    """Sizes of a linear that a method can adapt."""

    d_in: int
    d_out: int


class StackSizes(NamedTuple):
    """Sizes of one stack of a base.

    Attributes:
        layers: how many.
        d_model: D.
        heads: H.
        d_kv: size of a head.
        is_decoder: whether the stack is the decoder, which also has cross-attention.
        linears: the linears of every layer that can be adapted, by attention and name: "self_q", "cross_o".
    """

    layers: int
    d_model: int
    heads: int
    d_kv: int
    is_decoder: bool
    linears: Mapping[str, LinearShape]


class Adaptation:
    """Hooks that the layers of a stack call. By default none changes anything; a method overrides what it needs.

    `layer` is the layer's index in its stack. Tokens come flat, [N, ...]; `hdscale.ops.group_by_instance` groups them
    by instance.

    Attributes:
        adapts_attention: whether `projection` or `prefix` changes anything; if not, they are not called.
        adapts_outputs: whether `after_self_attention` or `after_feed_forward` changes anything.
    """

    adapts_attention = False
    adapts_outputs = False

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """The branch beside the feed-forward sub-layer (Eq. 2), or None.

        Args:
            layer: index of the layer.
            x: [N, D], the sub-layer's input.
            normed: [N, D], LayerNorm(x).
        """
        return None

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the self-attention's output before dropout and residual."""
        return y

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the feed-forward's output before dropout and residual."""
        return y

    def projection(self, layer: int, attention: str, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output of a linear of an attention.

        Args:
            layer: index of the layer.
            attention: "self" or "cross".
            name: "q", "k", "v" or "o".
            x: [N, in], the linear's input. y: [N, out], the frozen linear's output.

        Returns:
            [N, out].
        """
        return y

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, P, d_kv] in front of the tokens' own, which every query of the self-attention sees.

        Like the adapters, there is one per row, or one per instance with its beams adjacent. None: no prefix.
        """
        return None

    def for_generation(self) -> Adaptation:
        """The same adaptation with everything generated once, to be applied to one token after the other."""
        return self

    def select(self, rows: Tensor) -> Adaptation | None:
        """The same adaptation (made by `for_generation`) for some of its instances; None if that is not possible.

        Args:
            rows: int64, the instances to keep, in order.
        """
        return None

    def for_training(self, length: int) -> Adaptation:
        """The same adaptation for one pass over `length` tokens, whose layers may share work in the backward pass."""
        return self


class Source(NamedTuple):
    """A batch of sources in the form in which a base computes it.

    Attributes:
        input_ids: [B, S].
        mask: [B, S], 1 for tokens and 0 for padding.
        positions: [L], the indices of the tokens among the B * S; None if they are not known.
    """

    input_ids: Tensor
    mask: Tensor
    positions: Tensor | None = None

    def padded(self, multiple: int) -> Source:
        """The same source with its length padded to a multiple."""
        length = self.input_ids.shape[1]
        extra = -length % multiple
        if extra == 0:
            return self
        positions = self.positions
        if positions is not None:
            positions = positions + positions // length * extra
        return Source(F.pad(self.input_ids, (0, extra)), F.pad(self.mask, (0, extra)), positions)


class Encoding(NamedTuple):
    """What the decoder sees of a source.

    Attributes:
        hidden: [B, S, D].
        mask: [B, S].
    """

    hidden: Tensor
    mask: Tensor


class TokenDecoder(ABC):
    """The decoder over one more token of each row at a time; made by `Base.token_decoder`."""

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B], the last of each row -> [B, D], the input of the head."""

    @abstractmethod
    def keep(self, rows: Tensor) -> bool:
        """Continue with some of the rows, and return whether the adaptation allows that.

        Args:
            rows: int64, the rows to keep, in order.
        """


class Base(nn.Module, ABC):
    """A frozen encoder-decoder.

    Its parameters have the names that they have in transformers. In `train()` the base's own dropout is active.

    Attributes:
        config: of transformers.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig | None = None
    """Of the checkpoint, for transformers' `generate`."""
    part_names: ClassVar[tuple[str, ...]]
    """The modules that together have all parameters, in order, as `hdscale params` lists them."""

    @classmethod
    @abstractmethod
    def stack_sizes(cls, config: PretrainedConfig, stack: str) -> StackSizes:
        """Sizes of the "encoder" or the "decoder" of a base with this configuration."""

    def sizes(self, stack: str) -> StackSizes:
        """Sizes of the "encoder" or the "decoder"."""
        return self.stack_sizes(self.config, stack)

    @abstractmethod
    def weights_per_token(self, part: str) -> int:
        """Weights that a token is multiplied with in the "encoder", the "decoder" or the "head"."""

    @abstractmethod
    def norm_names(self) -> list[str]:
        """Names of the weights of all layer norms within the layers."""

    def prepare(self, source: Source) -> Source:
        """The same source, padded to a length that the device computes well."""
        return source

    @abstractmethod
    def encode(self, source: Source, adaptation: Adaptation | None = None, packed: bool = False) -> Encoding:
        """Run the encoder.

        Args:
            source: made by `prepare`.
            adaptation: of the encoder.
            packed: compute the tokens as one sequence without padding; the adaptation is the same for all instances.
        """

    @abstractmethod
    def decode(self, input_ids: Tensor, encoding: Encoding, adaptation: Adaptation | None = None) -> Tensor:
        """Run the decoder over whole rows, [B, T] -> [B, T, D], the input of the head."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""

    @abstractmethod
    def token_decoder(
        self, encoding: Encoding, adaptation: Adaptation | None, most_tokens: int, project_source: bool | None = None
    ) -> TokenDecoder:
        """Start to decode greedily.

        Args:
            encoding: of B instances.
            adaptation: of the decoder, made by `for_generation`.
            most_tokens: largest number of tokens that will be decoded.
            project_source: compute and keep keys and values of the source. Default: the cheaper way.
        """

    @abstractmethod
    def decode_with_cache(
        self, input_ids: Tensor, encoding: Encoding, adaptation: Adaptation | None, cache: Any
    ) -> Tensor:
        """Run the decoder over the next tokens [R, T] of each row, with a cache of transformers -> [R, T, D].

        Args:
            input_ids: [R, T].
            encoding: of R rows.
            adaptation: of the decoder, made by `for_generation`.
            cache: `EncoderDecoderCache`, extended in place.
        """

    @abstractmethod
    def checkpoint_activations(self, where: str) -> None:
        """Recompute activations in the backward pass of: none, encoder, decoder or all."""

    @abstractmethod
    def compile_steps(self, on: bool = True) -> None:
        """Compile the steps of a layer for training when they are first used, or stop using the compiled ones."""

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """Labels [B, T] -> the decoder's input [B, T] that predicts them: moved by one, padding ids for -100."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        inputs = torch.full_like(labels, start)
        inputs[:, 1:] = labels[:, :-1]
        return inputs.masked_fill_(inputs < 0, padding)
