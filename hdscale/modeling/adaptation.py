"""`Adaptation`: what a method adds to the blocks of one stack, as a value that travels through its forward.

Conditioning is an explicit argument and never an attribute left on a module: activation checkpointing then recomputes
with the very same adapters, and beams, threads and micro-batches share no state.

Shapes in this room: B batch, S source, T target, D d_model, A adapter size, K hypernetwork bottleneck, N layers.
R is the number of decoder rows: B, or B times the number of beams with the beams of an instance side by side.
"""

from __future__ import annotations

from torch import Tensor


class Adaptation:
    """Hooks that an adapted block calls; by default none of them changes anything.

    `layer` is the block's index in its stack. A method overrides what it needs.
    """

    def parallel(self, layer: int, x: Tensor, normed: Tensor) -> Tensor | None:
        """The branch beside the feed-forward sub-layer (Eq. 2), or None.

        Args:
            layer: index of the block.
            x: [R, T, D], the sub-layer's input.
            normed: [R, T, D], LayerNorm(x).
        """
        return None

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        """[R, T, D] -> [R, T, D]: the self-attention's output before dropout and residual."""
        return y

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        """[R, T, D] -> [R, T, D]: the feed-forward's output before dropout and residual."""
        return y

    def for_generation(self) -> Adaptation:
        """The same adaptation with everything generated once, to be applied token by token."""
        return self
