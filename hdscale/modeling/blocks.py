"""Transformers' T5 and MT5 blocks, made to carry an `Adaptation` through their forward.

A base model is adapted by giving its own blocks a subclass of their class: weights, names and every code path of
transformers stay as they are, and with `adaptation=None` a block computes exactly what it did before.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from hdscale.modeling.adaptation import Adaptation


class AdaptedBlock:
    """Mixin over T5Block and MT5Block: the block's forward with an adaptation's hooks in their places."""

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


class AdaptedSeq2Seq:
    """Mixin over the conditional-generation classes: a forward that names `adaptation`, so that `generate` accepts it.

    Within `generate` the encoder has run already: the adaptation is the decoder's.
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
    """The subclass of a transformers class with `mixin` before it."""
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": __name__})


def adapt_blocks(base: nn.Module) -> None:
    """Make a T5-family model's blocks and its generation accept `adaptation=`, in place."""
    for stack in (base.encoder, base.decoder):
        for index, block in enumerate(stack.block):
            block.__class__ = adapted_class(AdaptedBlock, type(block))
            block.hdscale_layer = index
    base.__class__ = adapted_class(AdaptedSeq2Seq, type(base))


def set_activation_checkpointing(base: nn.Module, where: str) -> None:
    """Recompute activations in the backward pass of the encoder's or the decoder's blocks, or of both.

    Args:
        where: none, encoder, decoder or all.
    """
    if where == "none":
        base.activation_checkpointing_disable()
        return
    # the re-entrant form needs inputs that require a gradient, which a frozen base's do not
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for name, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        for module in stack.modules():
            if not hasattr(module, "gradient_checkpointing"):
                continue
            # T5Attention would make its zero position bias require a gradient, which costs SDPA its fused kernels
            attention = module.__class__.__name__.endswith("Attention")
            module.gradient_checkpointing = where in (name, "all") and not attention
