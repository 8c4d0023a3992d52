"""T5, mT5 and UMT5: one forward for padded and packed tokens, whole rows and cached ones, training and inference.

A stack runs over flat tokens [N, D]; what knows about rows, packing and caches is an attention object (see
`hdscale.bases.attention`), and the hooks of an adaptation are called in `Layer.forward` alone. Modules and parameters
have the names that they have in transformers; with `adaptation=None` the results are transformers', up to rounding.

The residual stays open between sub-layers: x and the last output y travel separately, and `add_norm` closes them where
the next norm is computed, in one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from hdscale.bases import fused
from hdscale.bases.attention import CrossAttention, Heads, SelfAttention, WholeRows, causal
from hdscale.bases.caches import KeptSource, LibraryCache, LibrarySource, NextToken, kept_dtype
from hdscale.bases.cross_attention import (
    DECODING_GAIN,
    MOST_BYTES_AT_ONCE,
    Projected,
    ProjectedAtOnce,
    Unprojected,
    leaves_source,
)
from hdscale.bases.dropout import dropout as dropped
from hdscale.bases.interface import Adaptation, Base, Encoding, LinearShape, Source, StackSizes, TokenDecoder
from hdscale.bases.linears import add_product, joined_product, together
from hdscale.bases.packing import Packed
from hdscale.bases.positions import ALIGNMENT, Buckets, source_mask
from hdscale.bases.steps import Steps, activation, add_norm, compiled, norm
from hdscale.ops.precision import at_least_float32


class Attention(nn.Module):
    """The linears of an attention, and the biases [buckets, H] of its relative positions if it has any of its own."""

    def __init__(self, config: PretrainedConfig, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.has_bias = has_bias
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)


class FeedForward(nn.Module):
    """The linears of a feed-forward, with one input product or, if gated, two."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def inputs(self) -> list[nn.Linear]:
        """The linears that read the feed-forward's input."""
        return [cast(nn.Linear, module) for name, module in self.named_children() if name != "wo"]


class Norm(nn.Module):
    """The weight of a norm."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.epsilon)


class SubLayer(nn.Module):
    """One sub-layer with its norm, under the names of transformers.

    Args:
        name: of the attention or feed-forward.
        module: it.
        config: of the base.
    """

    layer_norm: Norm

    def __init__(self, name: str, module: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.add_module(name, module)
        self.layer_norm = Norm(config)


class Parts(NamedTuple):
    """The modules of a layer that its forward uses."""

    own: Attention
    cross: Attention | None
    feed_forward: FeedForward
    inputs: list[nn.Linear]
    norms: list[Norm]


class Layer(nn.Module):
    """One layer of a stack: self-attention, in the decoder cross-attention, feed-forward.

    Args:
        config: of the base.
        index: of the layer in its stack.
        is_decoder: whether it has cross-attention.
    """

    gathered_whole = True
    """DeepSpeed's stage 3 gathers all weights of a layer together: which of them a pass uses can depend on lengths,
    and ranks with different lengths must gather the same."""

    def __init__(self, config: PretrainedConfig, index: int, is_decoder: bool) -> None:
        super().__init__()
        # T5's layers share the biases of the first one, each of UMT5's has its own
        own = Attention(config, has_bias=index == 0 or config.model_type == "umt5")
        cross = Attention(config, has_bias=False) if is_decoder else None
        feed_forward = FeedForward(config)
        parts: list[tuple[str, nn.Module]] = [("SelfAttention", own), ("DenseReluDense", feed_forward)]
        if cross is not None:
            parts.insert(1, ("EncDecAttention", cross))
        subs = [SubLayer(name, module, config) for name, module in parts]
        self.layer = nn.ModuleList(subs)
        self.index, self.is_decoder, self.epsilon = index, is_decoder, config.layer_norm_epsilon
        self.steps = Steps(add_norm, activation(config.dense_act_fn, config.is_gated_act))
        self.gated_gelu = config.is_gated_act and config.dense_act_fn == "gelu_new"
        self.compiled = False
        # the same modules once more, not registered again: looking them up by name takes time in every pass
        self.parts = Parts(own, cross, feed_forward, feed_forward.inputs(), [sub.layer_norm for sub in subs])

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        attend: SelfAttention,
        cross: CrossAttention | None,
        adaptation: Adaptation | None,
        dropout: float,
        closed: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run the layer over tokens [N, D].

        Args:
            x: the residual stream.
            y: the output of the layer before, still to be added to x.
            mask: what is added to the scores of self-attention; None before the first layer.
            attend, cross: the attentions; cross in the decoder.
            adaptation: of the stack.
            dropout: of the outputs of the sub-layers and inside the feed-forward.
            closed: add the layer's output to x.

        Returns:
            x, the layer's output to be added to it (None if `closed`), mask.
        """
        parts, steps, epsilon = self.parts, self.steps, self.epsilon
        if parts.own.has_bias:
            mask = attend.mask(parts.own.relative_attention_bias.weight)
        assert mask is not None
        x, normed = steps.add_norm(x, y, parts.norms[0].weight, epsilon, dropout)
        adapts_outputs = adaptation is not None and adaptation.adapts_outputs
        adapted = adaptation if adaptation is not None and adaptation.adapts_attention else None
        plain = not dropout and not adapts_outputs
        mixed = self.attend_to_itself(parts.own, normed, mask, attend, adapted)
        x, y = add_product(x, mixed, parts.own.o, plain and adapted is None)
        if adapted is not None and y is not None:
            y = adapted.projection(self.index, "self", "o", mixed, y)
        if adapts_outputs:
            assert adaptation is not None and y is not None
            y = adaptation.after_self_attention(self.index, y)
        if cross is not None:
            assert parts.cross is not None
            x, normed = steps.add_norm(x, y, parts.norms[1].weight, epsilon, dropout)
            mixed = self.attend_to_source(parts.cross, normed, cross, adapted)
            x, y = add_product(x, mixed, parts.cross.o, not dropout and adapted is None)
            if adapted is not None and y is not None:
                y = adapted.projection(self.index, "cross", "o", mixed, y)
        x, normed = steps.add_norm(x, y, parts.norms[-1].weight, epsilon, dropout)
        hidden = self.activated(normed, dropout)
        branch = None if adaptation is None else adaptation.parallel(self.index, x, normed)
        x, y = add_product(x if branch is None else x + branch, hidden, parts.feed_forward.wo, plain)
        if adapts_outputs:
            assert adaptation is not None and y is not None
            y = adaptation.after_feed_forward(self.index, y)
        return (add(x, y, dropout), None, mask) if closed else (x, y, mask)

    def activated(self, x: Tensor, dropout: float) -> Tensor:
        """What the feed-forward's last product reads, [N, F]."""
        inputs = self.parts.inputs
        if x.shape[0] > fused.MOST_TOKENS_JOINED:
            return self.steps.activation(tuple(F.linear(x, linear.weight) for linear in inputs), dropout)
        if self.gated_gelu and not self.compiled and x.is_cuda and torch.is_grad_enabled():
            joined = joined_product(x, *inputs)
            if joined is not None and joined.requires_grad:
                return fused.gated_gelu(joined, dropout)
        return self.steps.activation(together(x, *inputs), dropout)

    def attend_to_itself(
        self, attention: Attention, x: Tensor, mask: Tensor, attend: SelfAttention, adapted: Adaptation | None
    ) -> Tensor:
        """What self-attention mixes for x, [N, H * d]; `adapted`: the adaptation, if it adapts the attention."""
        linears = attention.q, attention.k, attention.v
        if adapted is None:
            return self.mixture(attend, x, linears, mask)
        # apart: where some are adapted, the backward pass would keep all of a joined product for the others
        query, key, value = (
            adapted.projection(self.index, "self", name, x, F.linear(x, linear.weight))
            for name, linear in zip("qkv", linears, strict=True)
        )
        return attend(self.index, query, key, value, mask, adapted.prefix(self.index))

    def mixture(self, attend: SelfAttention, x: Tensor, linears: tuple[nn.Linear, ...], mask: Tensor) -> Tensor:
        """What self-attention mixes for x with linears that are not adapted: [N, H * d]."""
        joined = joined_product(x, *linears)
        mixed = None if joined is None else attend.joined(joined, mask)
        if mixed is not None:
            return mixed
        query, key, value = (F.linear(x, one.weight) for one in linears) if joined is None else joined.chunk(3, dim=-1)
        return attend(self.index, query, key, value, mask, None)

    def attend_to_source(
        self, attention: Attention, x: Tensor, cross: CrossAttention, adapted: Adaptation | None
    ) -> Tensor:
        """What cross-attention mixes for x, [N, H * d]; `adapted`: the adaptation, if it adapts the attention."""
        query = F.linear(x, attention.q.weight)
        if adapted is not None:
            query = adapted.projection(self.index, "cross", "q", x, query)
        return cross(self.index, query, attention.k, attention.v, adapted)


def add(x: Tensor, y: Tensor | None, dropout: float) -> Tensor:
    """x + dropout(y)."""
    if y is None:
        return x
    return x + dropped(y, dropout)


class Stack(nn.Module):
    """The encoder or the decoder.

    Args:
        config: of the base.
        embeddings: of the tokens, which both stacks share.
        is_decoder: whether it is the decoder.
    """

    def __init__(self, config: PretrainedConfig, embeddings: nn.Embedding, is_decoder: bool) -> None:
        super().__init__()
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.embed_tokens = embeddings
        self.block = nn.ModuleList(Layer(config, index, is_decoder) for index in range(layers))
        self.final_layer_norm = Norm(config)
        self.dropout_rate = config.dropout_rate
        self.recompute = False

    @property
    def dropout(self) -> float:
        """The active rate of dropout."""
        return self.dropout_rate if self.training else 0.0

    def forward(
        self, ids: Tensor, attend: SelfAttention, cross: CrossAttention | None, adaptation: Adaptation | None
    ) -> Tensor:
        """Token ids [N] -> [N, D]."""
        dropout = self.dropout
        x = self.embed_tokens(ids)
        if torch.is_grad_enabled() and not x.requires_grad and hasattr(self.embed_tokens.weight, "ds_id"):
            # DeepSpeed's stage 3 takes a layer whose inputs need no gradient for one that has no backward pass: it
            # would give up the first layer's weights, and reduce its gradients, before they are computed
            x = x.requires_grad_()
        x = dropped(x, dropout)
        y: Tensor | None = None
        mask: Tensor | None = None
        recompute = self.recompute and torch.is_grad_enabled()
        for layer in self.block:
            if recompute:
                # closed, so that only x is kept between the layers
                x, y, mask = checkpoint(
                    layer, x, None, mask, attend, cross, adaptation, dropout, True, use_reentrant=False
                )
            else:
                x, y, mask = layer(x, y, mask, attend, cross, adaptation, dropout)
        x = self.final_layer_norm(add(x, y, dropout))
        return dropped(x, dropout)


class T5(Base):
    """A base of T5's family (Raffel et al. 2020; mT5: Xue et al. 2021; UMT5: Chung et al. 2023).

    Args:
        config: of transformers.
        own_head: whether the head has weights of its own (from v1.1 on) or those of the embeddings.
    """

    part_names = ("shared", "encoder", "decoder", "lm_head")

    def __init__(self, config: PretrainedConfig, own_head: bool) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared, is_decoder=False)
        self.decoder = Stack(config, self.shared, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not own_head:
            self.lm_head.weight = self.shared.weight
        self.output_scale = config.d_model**-0.5 if scales_output(config, own_head) else 1.0
        self.requires_grad_(False)

    @classmethod
    def stack_sizes(cls, config: PretrainedConfig, stack: str) -> StackSizes:
        is_decoder = stack == "decoder"
        inner = config.num_heads * config.d_kv
        into, out = LinearShape(config.d_model, inner), LinearShape(inner, config.d_model)
        attentions = ("self", "cross") if is_decoder else ("self",)
        linears = {f"{kind}_{name}": out if name == "o" else into for kind in attentions for name in "qkvo"}
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        return StackSizes(layers, config.d_model, config.num_heads, config.d_kv, is_decoder, linears)

    def weights_per_token(self, part: str) -> int:
        module = self.get_submodule("lm_head" if part == "head" else part)
        return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))

    def norm_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.endswith("layer_norm.weight")]

    def heads(self, stack: Stack, attention_dropout: bool = True) -> Heads:
        """How the attentions of a stack compute in the present mode."""
        config = self.config
        explicit = config._attn_implementation == "eager"
        return Heads(config.num_heads, config.d_kv, explicit, stack.dropout if attention_dropout else 0.0)

    def buckets(self, stack: Stack) -> Buckets:
        """How the relative positions of a stack share biases."""
        config = self.config
        return Buckets(
            config.relative_attention_num_buckets, config.relative_attention_max_distance, stack is self.encoder
        )

    def prepare(self, source: Source) -> Source:
        # a GPU's attention would copy masks of other lengths
        return source if source.input_ids.device.type == "cpu" else source.padded(ALIGNMENT)

    def encode(self, source: Source, adaptation: Adaptation | None = None, packed: bool = False) -> Encoding:
        stack = self.encoder
        if packed:
            # FlexAttention has no dropout of probabilities; packing does without it on every device
            whole = Packed(self.heads(stack, attention_dropout=False), source, self.buckets(stack))
            hidden = whole.padded(stack(whole.tokens(source.input_ids), whole, None, adaptation))
            return Encoding(hidden, source.mask)
        rows, length = source.input_ids.shape
        visible = source.mask[:, None, None, :].bool()
        attend = WholeRows(self.heads(stack), rows, self.buckets(stack), visible)
        hidden = stack(source.input_ids.flatten(), attend, None, adaptation)
        return Encoding(hidden.view(rows, length, -1), source.mask)

    def decode(self, input_ids: Tensor, encoding: Encoding, adaptation: Adaptation | None = None) -> Tensor:
        stack, (rows, length) = self.decoder, input_ids.shape
        heads = self.heads(stack)
        attend = WholeRows(heads, rows, self.buckets(stack), causal(length, input_ids.device))
        adapted = adaptation is not None and adaptation.adapts_attention
        cross = self.cross_attention(heads, length, encoding, adapted)
        return stack(input_ids.flatten(), attend, cross, adaptation).view(rows, length, -1)

    def cross_attention(self, heads: Heads, length: int, encoding: Encoding, adapted: bool) -> CrossAttention:
        """The way to attend to a source that has the least to compute, or on a GPU the fewest launches.

        Args:
            heads: of the decoder.
            length: number of targets of each row.
            encoding: of the source.
            adapted: whether keys and values of the source are adapted.
        """
        hidden, mask = encoding.hidden, source_mask(encoding.mask, encoding.hidden.dtype)
        if adapted or heads.explicit:
            return Projected(heads, hidden, mask)
        if leaves_source(hidden, length, heads.size):
            return Unprojected(heads, hidden, mask)
        layers = [cast(Layer, layer).parts.cross for layer in self.decoder.block]
        linears = [linear for cross in layers if cross is not None for linear in (cross.k, cross.v)]
        size = hidden[..., 0].numel() * len(linears) * heads.number * heads.size * hidden.element_size()
        if size <= MOST_BYTES_AT_ONCE:
            sides = joined_product(hidden.flatten(0, 1), *linears)
            if sides is not None:
                return ProjectedAtOnce(heads, sides, mask)
        return Projected(heads, hidden, mask)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden * self.output_scale if self.output_scale != 1.0 else hidden)

    def token_decoder(
        self, encoding: Encoding, adaptation: Adaptation | None, most_tokens: int, project_source: bool | None = None
    ) -> TokenDecoder:
        return NextTokens(self, encoding, adaptation, most_tokens, project_source)

    def decode_with_cache(
        self, input_ids: Tensor, encoding: Encoding, adaptation: Adaptation | None, cache: Any
    ) -> Tensor:
        stack, (rows, length) = self.decoder, input_ids.shape
        heads = self.heads(stack)
        attend = LibraryCache(heads, rows, length, cache.self_attention_cache, self.buckets(stack))
        cross = LibrarySource(heads, encoding.hidden, source_mask(encoding.mask, encoding.hidden.dtype), cache)
        return stack(input_ids.flatten(), attend, cross, adaptation).view(rows, length, -1)

    def checkpoint_activations(self, where: str) -> None:
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            stack.recompute = where in (name, "all")

    def compile_steps(self, on: bool = True) -> None:
        steps = Steps(add_norm, activation(self.config.dense_act_fn, self.config.is_gated_act))
        if on:
            steps = Steps(*(compiled(step) for step in steps))
        for stack in (self.encoder, self.decoder):
            for layer in cast(list[Layer], stack.block):
                layer.steps, layer.compiled = steps, on


class NextTokens(TokenDecoder):
    """The decoder of T5 over one more token of each row; see `Base.token_decoder`."""

    def __init__(
        self,
        base: T5,
        encoding: Encoding,
        adaptation: Adaptation | None,
        most_tokens: int,
        project_source: bool | None,
    ) -> None:
        self.base, self.adaptation = base, adaptation
        heads, hidden = base.heads(base.decoder), encoding.hidden
        if project_source is None:
            project_source = not leaves_source(hidden, most_tokens, heads.size, DECODING_GAIN)
        self.attend = NextToken(heads, hidden.shape[0], most_tokens, base.buckets(base.decoder))
        self.cross: KeptSource | Unprojected
        if project_source or (adaptation is not None and adaptation.adapts_attention):
            self.cross = KeptSource(heads, hidden, source_mask(encoding.mask, kept_dtype(hidden)))
        else:
            wide = hidden.to(at_least_float32(hidden.dtype))
            self.cross = Unprojected(heads, wide, source_mask(encoding.mask, wide.dtype))

    def __call__(self, tokens: Tensor) -> Tensor:
        hidden = self.base.decoder(tokens, self.attend, self.cross, self.adaptation)
        self.attend.decoded += 1
        return hidden

    def keep(self, rows: Tensor) -> bool:
        if self.adaptation is not None:
            adaptation = self.adaptation.select(rows)
            if adaptation is None:
                return False
            self.adaptation = adaptation
        self.attend.keep(rows)
        self.cross.keep(rows)
        return True


def scales_output(config: PretrainedConfig, own_head: bool) -> bool:
    """Whether the decoder's output is multiplied by D**-0.5 before the head, as in v1.0 with its tied head.

    Transformers 5 ties the head in every configuration. It remembers what the checkpoint said for T5, and from 5.24 on
    for UMT5; before that the weights of a UMT5 tell. mT5 never scales.
    """
    said = getattr(config, "scale_decoder_outputs", None)
    return bool(said) if said is not None else config.model_type == "umt5" and not own_head
