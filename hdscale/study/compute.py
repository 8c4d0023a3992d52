"""Floating-point operations, time and communication of one step. docs/plan.md derives every term.

With a frozen base the backward pass forms gradients of activations only. So a product with a weight costs as much as in
the forward pass, not twice as much; products of two activations (attention's scores and sums) cost twice as much; and
nothing is computed before the first adapter. Adapters and the hypernetwork train: their backward pass costs twice the
forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdscale.study.hardware import Device
from hdscale.study.memory_model import Architecture, Sharding, Work

EFFICIENCY = 0.35
"""Share of the dense peak that training reaches: the project's aim for T5 v1.1 on one H200, an assumption elsewhere."""

DECODING_EFFICIENCY = 0.5
"""Share of the memory bandwidth that greedy decoding reaches (it is bound by reading the weights)."""


@dataclass(frozen=True)
class Flops:
    """Operations of one row (source and target padded to S and T).

    Attributes:
        encoder, decoder: forward through the frozen stacks, head included. adapters: forward of what trains, generation
            included. training: forward, backward and recomputation.
    """

    encoder: float
    decoder: float
    adapters: float
    training: float

    @property
    def forward(self) -> float:
        return self.encoder + self.decoder + self.adapters


def row_flops(base: Architecture, work: Work, bottleneck: int) -> Flops:
    """Operations of one row.

    Args:
        bottleneck: K of the hypernetwork (0: no generated adapters).
    """
    s, t, d = work.source, work.target, base.d_model
    inner = base.heads * base.d_kv
    matrices = (3 if base.gated else 2) * d * base.d_ff
    encoder_scores = 4 * s * s * inner
    encoder_layer = 2 * s * (4 * d * inner + matrices) + encoder_scores
    decoder_scores = 4 * t * t * inner + 4 * t * s * inner
    cross = 2 * t * 2 * d * inner + 2 * s * 2 * d * inner
    decoder_layer = 2 * t * (4 * d * inner + matrices) + cross + decoder_scores
    head = 2 * t * d * base.vocabulary
    encoder = work.encoder_passes * base.encoder_layers * encoder_layer
    decoder = base.decoder_layers * decoder_layer + head
    apply_encoder = work.encoder_passes * base.encoder_layers * 4 * s * d * work.encoder_dim
    generation = 4 * d * work.decoder_dim * bottleneck if work.generated else 0
    apply_decoder = base.decoder_layers * (4 * t * d * work.decoder_dim + generation)
    adapters = apply_encoder + apply_decoder
    # a layer is recomputed up to the last tensor that its backward pass needs: all but its last product
    last = 2 * d * base.d_ff
    recomputed = 0.0
    if work.checkpointing in ("encoder", "all"):
        recomputed += encoder - work.encoder_passes * base.encoder_layers * last * s
    if work.checkpointing in ("decoder", "all"):
        recomputed += decoder - head + base.decoder_layers * (generation - last * t)
    # no gradient flows below the first adapter, which is in the first block
    differentiated = work.encoder_passes * (base.encoder_layers - 1) if work.encoder_dim else 0
    frozen_backward = differentiated * (encoder_layer + encoder_scores) + decoder + base.decoder_layers * decoder_scores
    if work.trains_base:
        frozen_backward = 2 * (encoder + decoder)
    # the compiled operator forms the generated weights again in the backward pass
    again = 0 if work.keeps_generated or not work.generated else base.decoder_layers * generation
    training = encoder + decoder + frozen_backward + 3 * adapters + again + recomputed
    return Flops(encoder, decoder, adapters, training)


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in an optimizer step (ring algorithms: 2 (W-1)/W of the data for an all-reduce).

    Attributes:
        gradients, weights: of the trainables. gathered: frozen weights under ZeRO-3, forward and backward.
    """

    gradients: float
    weights: float
    gathered: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.gathered


def communication(
    trainable: int, frozen_bytes: float, work: Work, sharding: Sharding, micro_batches: int
) -> Communication:
    """What a step communicates.

    Gradients travel in float32. ZeRO-1 reduces them once per step, ZeRO-2 and 3 after each micro-batch; the new weights
    are gathered once. ZeRO-3 gathers the whole model twice per micro-batch.
    """
    share = (sharding.ranks - 1) / sharding.ranks
    times = 1 if sharding.stage == 1 else micro_batches
    # DeepSpeed's ZeRO-1 all-reduces, ZeRO-2 and 3 reduce-scatter
    gradients = 4 * trainable * share * times * (2 if sharding.stage == 1 else 1)
    weights = work.dtype_bytes * trainable * share
    gathered = 2 * frozen_bytes * share * micro_batches if sharding.stage == 3 else 0.0
    return Communication(gradients, weights, gathered)


def seconds_of(flops: float, device: Device, dtype: str, efficiency: float) -> float:
    """Seconds that a number of operations takes on one GPU."""
    return flops / ((device.bf16 if dtype == "bf16" else device.tf32) * efficiency)


def decoding_seconds(base: Architecture, rows: float, tokens: float, batch: int, e: int, device: Device) -> float:
    """Time of greedy decoding on one GPU, without the encoder's pass.

    For each token of a batch the decoder's weights are read once.
    """
    inner = base.heads * base.d_kv
    weights = base.decoder_layers * (8 * base.d_model * inner + (3 if base.gated else 2) * base.d_model * base.d_ff)
    weights += base.d_model * base.vocabulary
    return rows / max(batch, 1) * tokens * e * weights / (device.bandwidth * DECODING_EFFICIENCY)
