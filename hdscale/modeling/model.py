"""The adapted model: a frozen base, a method, and the passes that training, decoding and analysis need."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from hdscale.bases import inference, packing
from hdscale.bases.base import load_base, scales_output
from hdscale.bases.greedy import Decoded, greedy_decode
from hdscale.bases.interface import Adaptation
from hdscale.errors import UserError
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods import method_class, settled

IGNORED = -100
"""Label of padding: no loss."""


class ModelOutput(NamedTuple):
    """What a training pass returns.

    Attributes:
        loss_sum: float32 scalar, cross-entropy summed over the target tokens.
        tokens: int64 scalar, the target tokens.
    """

    loss_sum: Tensor
    tokens: Tensor


class Encoded(NamedTuple):
    """An encoded batch: hidden states [B, S, D] and what adapts the decoder for it."""

    hidden: Tensor
    adaptation: Adaptation | None


class AdaptedModel(nn.Module):
    """A frozen T5-family model adapted by a method (Section 2).

    Build it with `build_model` or `from_pretrained`.

    Attributes:
        base: the transformers model. method: the method's own module. config: how both were built.
        label_smoothing: of the training loss.
    """

    def __init__(self, config: HyperdecoderConfig, base: nn.Module, method: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.method = method
        self.label_smoothing = 0.0

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task_ids: Tensor | None = None,
        source_positions: Tensor | None = None,
    ) -> Encoded:
        """Run the adapted encoder and generate what the decoder needs.

        Args:
            input_ids: [B, S]. attention_mask: [B, S]. task_ids: [B], needed by task-conditioned methods.
            source_positions: [L], where the source tokens stand among the B * S; read with `model.packing` alone: see
                `hdscale.bases.packing.encode`.
        """
        if self.method.needs_tasks and task_ids is None:
            raise UserError(f"method '{self.config.method.name}' is conditioned on tasks: give task_ids")

        lean = self._without_gradients()

        def run(adaptation: Adaptation | None) -> Tensor:
            if lean:
                return inference.encode(self.base.encoder, input_ids, attention_mask, adaptation)
            if adaptation is not None:
                adaptation = adaptation.for_training(input_ids.shape[1])
            if self.config.model.packing:
                return packing.encode(self.base.encoder, input_ids, attention_mask, source_positions, adaptation)
            return self.base.encoder(
                input_ids=input_ids, attention_mask=attention_mask, adaptation=adaptation
            ).last_hidden_state

        hidden = self.method.encode(run, attention_mask, task_ids)
        return Encoded(hidden, self.method.decoder_adaptation(hidden, attention_mask, task_ids))

    def _without_gradients(self) -> bool:
        """Whether a pass is one of evaluation, over parameters that are at hand (DeepSpeed's stage 3 gathers them in modules)."""
        encoder = self.base.encoder
        return not (torch.is_grad_enabled() or encoder.training or hasattr(encoder.final_layer_norm.weight, "ds_id"))

    def decode(
        self, encoded: Encoded, attention_mask: Tensor, labels: Tensor, target_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits at the label positions only.

        Args:
            target_positions: [M], where the labels that are not padding stand among the B * T (`collate` knows it);
                default: looked up, for which a GPU's host has to wait.

        Returns:
            logits [M, V] and labels [M] of the M positions that are not padding, row by row.
        """
        decoder_input = self.base._shift_right(labels)
        adaptation = encoded.adaptation
        if adaptation is not None:
            adaptation = adaptation.for_training(labels.shape[1])
        hidden = self.base.decoder(
            input_ids=decoder_input,
            encoder_hidden_states=encoded.hidden,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            adaptation=adaptation,
        ).last_hidden_state
        if target_positions is None:
            target_positions = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1).index_select(0, target_positions)
        if scales_output(self.base.config):
            hidden = hidden * self.base.config.d_model**-0.5
        return self.base.lm_head(hidden), labels.flatten().index_select(0, target_positions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        task_ids: Tensor | None = None,
        source_positions: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> ModelOutput:
        """The training pass: cross-entropy summed over target tokens (Section 2.4), in float32.

        Args:
            input_ids: [B, S]. attention_mask: [B, S]. labels: [B, T], -100 for padding. task_ids: [B].
            source_positions: [L], see `encode`. target_positions: [M], see `decode`.
        """
        encoded = self.encode(input_ids, attention_mask, task_ids, source_positions)
        logits, targets = self.decode(encoded, attention_mask, labels, target_positions)
        loss_sum = F.cross_entropy(
            logits.float() if logits.dtype != torch.float64 else logits,
            targets,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        # filled on the device: copying a number there would wait for it
        return ModelOutput(loss_sum, torch.full((), targets.shape[0], dtype=torch.int64, device=targets.device))

    @torch.no_grad()
    def log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, task_ids: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood of each row's labels, summed over its tokens: float32 [B]."""
        encoded = self.encode(input_ids, attention_mask, task_ids)
        logits, targets = self.decode(encoded, attention_mask, labels)
        token = -F.cross_entropy(logits.float(), targets, reduction="none")
        rows = (labels != IGNORED).nonzero()[:, 0]
        return torch.zeros(labels.shape[0], device=token.device).index_add_(0, rows, token)

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """The vector [B, D] that conditions the decoder (e of Eq. 8)."""
        hidden = self.encode(input_ids, attention_mask, task_ids).hidden
        return self.method.embed(hidden, attention_mask, task_ids)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Decode with the adapters generated once per instance.

        Plain greedy search (nothing but lengths asked for) is a small loop of ours, everything else transformers'
        `generate`.

        Args:
            input_ids: [B, S]. attention_mask: [B, S]. task_ids: [B].
            **kwargs: whatever transformers' `generate` takes (greedy, beams, sampling).

        Returns:
            token ids [B, T'] (or [B * num_return_sequences, T']), the decoder's start token first.
        """
        if is_plain_greedy(kwargs) and self._without_gradients():
            return self._greedy(input_ids, attention_mask, task_ids, kwargs, scored=False).ids
        encoded = self.encode(input_ids, attention_mask, task_ids)
        adaptation = encoded.adaptation.for_generation() if encoded.adaptation is not None else None
        return self.base.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            attention_mask=attention_mask,
            adaptation=adaptation,
            **kwargs,
        )

    @torch.no_grad()
    def generate_with_scores(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`generate`, and the log-likelihood of what it gives, summed over each row's tokens: float32 [B].

        With plain greedy search the scores cost no pass of their own.
        """
        if is_plain_greedy(kwargs) and self._without_gradients():
            return self._greedy(input_ids, attention_mask, task_ids, kwargs, scored=True)
        ids = self.generate(input_ids, attention_mask, task_ids, **kwargs)
        config, generated = self.base.config, ids[:, 1:]
        after_end = (generated == config.eos_token_id).cumsum(dim=1) - (generated == config.eos_token_id).long() > 0
        labels = generated.masked_fill(after_end | (generated == config.pad_token_id), IGNORED)
        return ids, self.log_likelihood(input_ids, attention_mask, labels, task_ids)

    def _greedy(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task_ids: Tensor | None,
        arguments: dict[str, Any],
        scored: bool,
    ) -> Decoded:
        encoded = self.encode(input_ids, attention_mask, task_ids)
        adaptation = encoded.adaptation.for_generation() if encoded.adaptation is not None else None
        lengths = {name: arguments[name] for name in ("max_new_tokens", "min_new_tokens") if name in arguments}
        return greedy_decode(self.base, encoded.hidden, attention_mask, adaptation, scored=scored, **lengths)

    def trainable_names(self) -> list[str]:
        """Names of the parameters that train, in the model's order."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def learning_rates(self, default: float) -> dict[str, float]:
        """Peak learning rates {name of a parameter: rate} that the method wants other than the default."""
        return {f"method.{name}": rate for name, rate in self.method.learning_rates(default).items()}

    def save_pretrained(self, folder: str, tensors: dict[str, Tensor] | None = None) -> None:
        """Export the trainables: see `hdscale.modeling.export.save_pretrained`."""
        from hdscale.modeling.export import save_pretrained

        save_pretrained(self, folder, tensors)


def is_plain_greedy(arguments: dict[str, Any]) -> bool:
    """Whether `generate`'s arguments ask for greedy search and lengths, and for nothing else."""
    return (
        "max_new_tokens" in arguments
        and arguments.keys() <= {"max_new_tokens", "min_new_tokens", "num_beams", "do_sample"}
        and arguments.get("num_beams", 1) == 1
        and not arguments.get("do_sample", False)
    )


def build_model(
    config: HyperdecoderConfig,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    trainable_dtype: torch.dtype | None = None,
) -> AdaptedModel:
    """The base of `config.model` adapted by `config.method`; only the method's parameters require gradients.

    Args:
        config: base, method and tasks (not changed).
        dtype: of the base.
        device: "meta" counts without memory.
        seed: of whatever is initialised randomly; the caller's random state is left alone.
        trainable_dtype: of what trains; default: `dtype`. For training in bf16 give float32: the engine makes its
            float32 masters from these exact values.

    Raises:
        UserError: for anything in the configuration that does not fit, before weights are loaded.
    """
    config = HyperdecoderConfig.from_dict(config.to_dict())
    cls = method_class(config.method)
    settled(cls, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainable_dtype = trainable_dtype or dtype
        base = load_base(config.model, trainable_dtype if cls.trains_base else dtype, device)
        # one stream of random numbers for the method whatever the base was, built in or loaded
        torch.manual_seed(seed)
        with torch.device(device):
            method = cls(config, base)
        method.to(trainable_dtype)
    for name in method.base_trainables(base):
        base.get_parameter(name).requires_grad_(True)
    model = AdaptedModel(config, base, method)
    if config.model.init_adapter and torch.device(device).type != "meta":
        from hdscale.modeling.export import load_trainables

        load_trainables(model, config.model.init_adapter)
    return model
