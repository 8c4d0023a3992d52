"""Transformers' T5 and MT5 blocks, extended to pass an `Adaptation` through their forward.

A base model is adapted by giving its blocks a subclass of their own class: weights, names and every code path of
transformers stay the same. With `adaptation=None` a block computes what it did before, up to rounding, because norms
and GELU are one operation each (`hdscale.bases.elementwise`). How the stacks pass masks and position biases to their
blocks is in `hdscale.bases.stacks`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import eager_attention_forward

from hdscale.bases.cross_attention import unprojected_attention
from hdscale.bases.elementwise import OneStepNorm, one_step_activation
from hdscale.bases.interface import Adaptation
from hdscale.bases.packing import Packing
from hdscale.bases.stacks import AdaptedStack


class AdaptedBlock:
    """Mixin for T5Block and MT5Block: the block's forward, with calls of the adaptation's hooks."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        past_key_values=None,
        adaptation: Adaptation | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if adaptation is None:
            return super().forward(
                hidden_states,
                attention_mask,
                position_bias,
                encoder_hidden_states,
                encoder_attention_mask,
                encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        layer = self.hdscale_layer
        x = hidden_states
        sub = self.layer[0]
        if adaptation.adapts_attention:
            kwargs["adaptation"] = adaptation
        y, position_bias, _ = sub.SelfAttention(
            sub.layer_norm(x),
            mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        x = x + sub.dropout(adaptation.after_self_attention(layer, y))
        cross_position_bias = None
        if self.is_decoder and encoder_hidden_states is not None:
            x, cross_position_bias, _ = self.layer[1](
                x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        sub = self.layer[-1]
        normed = sub.layer_norm(x)
        y = sub.dropout(adaptation.after_feed_forward(layer, sub.DenseReluDense(normed)))
        branch = adaptation.parallel(layer, x, normed)
        x = x + y if branch is None else x + y + branch
        return x, position_bias, cross_position_bias


class AdaptedAttention:
    """Mixin for T5Attention and MT5Attention: projections and prefixes of an adaptation inside the attention.

    Without an adaptation transformers' own forward runs. A prefix is put in front of keys and values after the cache
    was updated. The cache therefore contains the tokens' own keys and values only, and positions and masks are
    transformers'.
    """

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values=None,
        adaptation: Adaptation | None = None,
        source_unprojected: bool = False,
        packing: Packing | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if source_unprojected and key_value_states is not None:
            query = self.q(hidden_states).unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)
            dropout = self.dropout if self.training else 0.0
            mixed = unprojected_attention(query, key_value_states, self.k.weight, self.v.weight, position_bias, dropout)
            return self.o(mixed), position_bias, None
        if adaptation is None and packing is None:
            return super().forward(
                hidden_states,
                mask=mask,
                key_value_states=key_value_states,
                position_bias=position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
        cross = key_value_states is not None
        attention = "cross" if cross else "self"
        layer = self.hdscale_layer

        def project(name: str, x: Tensor) -> Tensor:
            y = getattr(self, name)(x)
            return y if adaptation is None else adaptation.projection(layer, attention, name, x, y)

        def heads(x: Tensor) -> Tensor:  # [R, L, H * d_kv] -> [R, H, L, d_kv]
            return x.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)

        if packing is not None:
            query, key, value = (heads(project(name, hidden_states)) for name in "qkv")
            mixed = packing.attend(query, key, value)
            return project("o", mixed.transpose(1, 2).flatten(2)), None, None

        cache, cached_tokens = past_key_values, 0
        if cache is not None:
            cached_tokens = cache.get_seq_length(self.layer_idx)
            if isinstance(cached_tokens, Tensor):
                cached_tokens = cached_tokens.clone()  # a static cache updates its counter in place
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache

        query = heads(project("q", hidden_states))
        if (
            cross
            and isinstance(past_key_values, EncoderDecoderCache)
            and past_key_values.is_updated.get(self.layer_idx)
        ):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = key_value_states if cross else hidden_states
            key, value = heads(project("k", source)), heads(project("v", source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if cross and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True

        if position_bias is None:
            shape = (query.shape[2], key.shape[2])
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(*shape, device=query.device, past_seen_tokens=cached_tokens)
            else:
                position_bias = query.new_zeros(1, self.n_heads, *shape)

        # the layers share the position bias of the tokens, so the part for the prefix is added to a copy
        bias, prefix = position_bias, None if cross else adaptation.prefix(layer)
        if prefix is not None:
            length = prefix[0].shape[2]
            mask = mask_with_prefix(mask, query, key, length, kwargs.get("is_causal", self.is_causal))
            bias = functional.pad(position_bias, (length, 0))
            key, value = (
                torch.cat([rows_of(extra, own.shape[0]).to(own.dtype), own], dim=2)
                for extra, own in zip(prefix, (key, value), strict=True)
            )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=bias,
            **kwargs,
        )
        mixed = mixed.reshape(*hidden_states.shape[:-1], self.inner_dim)
        return project("o", mixed), position_bias, weights


def rows_of(prefix: Tensor, rows: int) -> Tensor:
    """A prefix [B, H, P, d_kv] repeated for R rows: the beams of an instance have the same one."""
    return prefix if prefix.shape[0] == rows else prefix.repeat_interleave(rows // prefix.shape[0], dim=0)


def mask_with_prefix(mask: Tensor | None, query: Tensor, key: Tensor, length: int, causal: bool) -> Tensor | None:
    """An attention mask for keys that begin with a prefix, which every query may see.

    Args:
        mask: boolean (True: may see) or additive, [R or 1, 1, L or 1, keys]; None if transformers leaves the causal
            mask to SDPA, or if nothing is masked.
        query: [R, H, L, d_kv].
        key: [R, H, keys, d_kv], without the prefix.
        length: of the prefix.
        causal: whether this attention is causal.

    Returns:
        the mask over `length + keys`, or None if nothing is masked.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        position = torch.arange(keys, device=query.device)
        mask = (position <= position[keys - queries :, None])[None, None]
    # in both kinds of mask, the padding value is the one that lets a query see the key
    return functional.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


class AdaptedSeq2Seq:
    """Mixin for the conditional-generation classes: its forward has an argument `adaptation`, so `generate` accepts it.

    Within `generate` the encoder has run already, so the adaptation is the decoder's.
    """

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        adaptation: Adaptation | None = None,
        **kwargs,
    ):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            adaptation=adaptation,
            **kwargs,
        )


@functools.cache
def adapted_class(mixin: type, cls: type) -> type:
    """A subclass of a transformers class with a mixin."""
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": __name__})


def adapt_blocks(base: nn.Module) -> None:
    """Make the stacks, blocks and generation of a T5-family model accept `adaptation=`, in place."""
    for stack in (base.encoder, base.decoder):
        stack.__class__ = adapted_class(AdaptedStack, type(stack))
        for module in stack.modules():
            # but not the norms of apex, which have a kernel of their own
            if hasattr(module, "variance_epsilon"):
                module.__class__ = adapted_class(OneStepNorm, type(module))
        for index, block in enumerate(stack.block):
            block.__class__ = adapted_class(AdaptedBlock, type(block))
            block.hdscale_layer = index
            dense = block.layer[-1].DenseReluDense
            dense.act = one_step_activation(dense.act)
            attentions = [block.layer[0].SelfAttention]
            if block.is_decoder:
                attentions.append(block.layer[1].EncDecAttention)
            for attention in attentions:
                attention.__class__ = adapted_class(AdaptedAttention, type(attention))
                attention.hdscale_layer = index
    base.__class__ = adapted_class(AdaptedSeq2Seq, type(base))


def set_activation_checkpointing(base: nn.Module, where: str) -> None:
    """Recompute activations in the backward pass of the encoder's or the decoder's blocks, or of both.

    Args:
        where: none, encoder, decoder or all.
    """
    if where == "none":
        base.activation_checkpointing_disable()
        return
    # the re-entrant form needs inputs that require a gradient, and those of a frozen base do not
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for name, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        for module in stack.modules():
            if not hasattr(module, "gradient_checkpointing"):
                continue
            # T5Attention would make its zero position bias require a gradient, and SDPA would lose its fused kernels
            attention = module.__class__.__name__.endswith("Attention")
            module.gradient_checkpointing = where in (name, "all") and not attention
