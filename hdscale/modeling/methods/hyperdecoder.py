"""The hyperdecoder and the grid around it (Tables 8, 13): {none, manual, task, generated} in each of the two stacks.

The paper's method has learned adapters in the encoder and generated ones in the decoder. With learned adapters in both
stacks it is the adapter baseline (A.1), with task-conditioned ones in both the task hypernet (A.2). Extensions of the
paper (other conditioning, LoRA and prefixes, layers that share an adapter, a hypernetwork per layer, scaled output) are
options of the same module, and off by default.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from hdscale.bases.adaptations import ComposedAdaptation, LayerwiseAdaptation, ScaledAdaptation
from hdscale.bases.interface import Adaptation, Base, StackSizes
from hdscale.bases.sizes import architecture, stack_sizes
from hdscale.errors import UserError, nearest
from hdscale.modeling.adapters import ManualAdaptation, ManualAdapters
from hdscale.modeling.conditioning import EncodingEmbedding, TaskEmbedding, masked_mean
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.hypernetwork import GeneratedAdaptation, GeneratedAdapterHeads, Hypernetwork
from hdscale.modeling.lora import GeneratedLora, GeneratedLoraAdaptation, adapted_linears, check_lora
from hdscale.modeling.methods.interface import Method, RunEncoder, required
from hdscale.modeling.methods.options import get_option
from hdscale.modeling.prefix import GeneratedPrefix, GeneratedPrefixAdaptation
from hdscale.modeling.settings import FORMS, MethodSettings, SideSettings

SIDES = ("encoder", "decoder")
KINDS = ("none", "manual", "task", "generated")
CONDITIONED = ("task", "generated")


def forms(side: SideSettings) -> list[str]:
    """What a task-conditioned or generated side generates: adapter, lora, prefix."""
    return side.form.split("+") if side.adapter in CONDITIONED else []


def parse_layers(text: str | None, layers: int, key: str) -> list[int]:
    """The layers of text such as "0-5,11", in ascending order.

    Args:
        text: the value of the option `key`.
        layers: number of layers of the stack.

    Raises:
        UserError: for text of another form, or layers that the stack does not have.
    """
    found: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (last.strip() or first.strip()).isdigit()):
            raise UserError(f"{key}={text}: write layers from 0, such as 0-5,11")
        found |= set(range(int(first), int(last or first) + 1))
    if found and max(found) >= layers:
        raise UserError(f"{key}={text}: the stack has layers 0 to {layers - 1}")
    return sorted(found)


class Side(nn.Module):
    """Adapts one stack.

    Args:
        name: encoder or decoder. An encoder with generated adapters runs twice: its first pass conditions the second,
            so it has learned adapters for the first pass.
        config: base, method and tasks.
        sizes: of the stack.
    """

    adapters: ManualAdapters
    shared_adapters: ManualAdapters
    task_embedding: TaskEmbedding
    embedding: EncodingEmbedding
    hypernetwork: Hypernetwork
    hypernetworks: nn.ModuleList

    def __init__(self, name: str, config: HyperdecoderConfig, sizes: StackSizes) -> None:
        super().__init__()
        settings: SideSettings = getattr(config.method, name)
        hypernet = config.method.hypernet
        layers, d_model = sizes.layers, sizes.d_model
        self.kind = settings.adapter
        self.normed_input = settings.input == "layernorm"
        self.per_layer = hypernet.per_layer
        self.fixed_scale = settings.scale
        self.scale: nn.Parameter | None = None
        if settings.learned_scale:
            self.scale = nn.Parameter(torch.full((layers,), settings.scale))
        if self.kind == "manual" or (self.kind == "generated" and not sizes.is_decoder):
            self.adapters = ManualAdapters(d_model, layers, settings.dim)
        if self.kind not in CONDITIONED:
            return

        self.shared = parse_layers(settings.shared_layers, layers, f"method.{name}.shared_layers")
        self.generated = [layer for layer in range(layers) if layer not in self.shared]
        if self.shared:
            self.shared_adapters = ManualAdapters(d_model, len(self.shared), settings.dim)
        if self.kind == "task":
            self.task_embedding = TaskEmbedding(len(config.tasks), d_model)
            size = d_model
        else:
            self.embedding = EncodingEmbedding(d_model, hypernet.mlp, hypernet.conditioning, hypernet.pools)
            size = self.embedding.size

        def heads() -> dict[str, nn.Module]:
            return generating_heads(settings, config.method, sizes)

        if self.per_layer:
            self.hypernetworks = nn.ModuleList(
                Hypernetwork(size, 1, hypernet.bottleneck, 0, heads()) for _ in self.generated
            )
        elif self.generated:
            self.hypernetwork = Hypernetwork(
                size, len(self.generated), hypernet.bottleneck, hypernet.layer_embedding, heads()
            )

    def manual(self) -> ManualAdaptation:
        """The learned adapters: of a manual side, or of a generated encoder's first pass."""
        return ManualAdaptation(self.adapters, self.normed_input)

    def adaptation(self, e: Tensor | None) -> Adaptation | None:
        """The stack's adaptation for a batch with embeddings e [B, ...] (None for sides without conditioning)."""
        if self.kind == "none":
            return None
        adaptation: Adaptation
        if self.kind == "manual":
            adaptation = self.manual()
        else:
            assert e is not None
            adaptation = self.conditioned(e)
        if self.scale is not None:
            # a copy instead of the parameter, which DeepSpeed's stage 3 partitions again after this module's forward
            return ScaledAdaptation(adaptation, self.scale * 1.0)
        return adaptation if self.fixed_scale == 1.0 else ScaledAdaptation(adaptation, self.fixed_scale)

    def conditioned(self, e: Tensor) -> Adaptation:
        """What is generated from e, combined with the learned adapters of the shared layers."""
        if not self.generated:
            return ManualAdaptation(self.shared_adapters, self.normed_input)
        layers: list[tuple[Adaptation, int]]
        if self.per_layer:
            layers = [(self.generate(cast(Hypernetwork, network), e), 0) for network in self.hypernetworks]
        else:
            generated = self.generate(self.hypernetwork, e)
            if not self.shared:
                return generated
            layers = [(generated, index) for index in range(len(self.generated))]
        by_layer = dict(zip(self.generated, layers, strict=True))
        if self.shared:
            shared = ManualAdaptation(self.shared_adapters, self.normed_input)
            by_layer |= {layer: (shared, index) for index, layer in enumerate(self.shared)}
        return LayerwiseAdaptation([by_layer[layer] for layer in range(len(by_layer))])

    def generate(self, hypernetwork: Hypernetwork, e: Tensor) -> Adaptation:
        """The adaptation that a hypernetwork generates from e [B, ...]."""
        codes = hypernetwork(e)
        members: list[Adaptation] = []
        for heads in hypernetwork.children():
            if isinstance(heads, GeneratedAdapterHeads):
                members.append(GeneratedAdaptation(heads, codes, self.normed_input))
            elif isinstance(heads, nn.ModuleDict):
                members.append(GeneratedLoraAdaptation(heads, codes))
            elif isinstance(heads, GeneratedPrefix):
                members.append(GeneratedPrefixAdaptation(heads, codes))
        return members[0] if len(members) == 1 else ComposedAdaptation(members)


def generating_heads(settings: SideSettings, method: MethodSettings, sizes: StackSizes) -> dict[str, nn.Module]:
    """The heads of one hypernetwork by name, for everything that a side generates."""
    bottleneck, lora = method.hypernet.bottleneck, method.lora
    heads: dict[str, nn.Module] = {}
    for form in forms(settings):
        if form == "adapter":
            heads["adapter_heads"] = GeneratedAdapterHeads(sizes.d_model, settings.dim, bottleneck, method.backend)
        elif form == "lora":
            scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
            linears = adapted_linears(sizes, lora.targets or "qv", lora.attention or "self")
            heads["lora_heads"] = nn.ModuleDict(
                {key: GeneratedLora(d_in, d_out, lora.rank, bottleneck, scale) for key, d_in, d_out in linears}
            )
        else:
            heads["prefix_heads"] = GeneratedPrefix(sizes.heads, sizes.d_kv, method.prefix.length, bottleneck)
    return heads


class Hyperdecoder(Method):
    """The hyperdecoder (Sections 2.1-2.3), and every other cell of the grid of Tables 8 and 13."""

    def __init__(self, config: HyperdecoderConfig, base: Base) -> None:
        super().__init__(config, base)
        self.encoder = Side("encoder", config, base.sizes("encoder"))
        self.decoder = Side("decoder", config, base.sizes("decoder"))
        self.needs_tasks = "task" in (self.encoder.kind, self.decoder.kind)

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        kinds = {name: cls.fixed.get(f"{name}.adapter", getattr(settings, name).adapter) for name in SIDES}
        found = [f"{name}.adapter" for name in kinds if f"{name}.adapter" not in cls.fixed]
        generated: set[str] = set()
        for name, kind in kinds.items():
            side: SideSettings = getattr(settings, name)
            if kind != "none":
                found += [f"{name}.{option}" for option in ("dim", "input", "scale", "learned_scale")]
            if kind in CONDITIONED:
                found += [f"{name}.form", f"{name}.shared_layers"]
                generated |= set(side.form.split("+"))
        if set(kinds.values()) & set(CONDITIONED):
            found += ["hypernet.bottleneck", "hypernet.layer_embedding", "hypernet.per_layer", "backend"]
        if "generated" in kinds.values():
            found += ["hypernet.conditioning", "hypernet.pools", "hypernet.mlp"]
        return found + [name for name in ("lora", "prefix") if name in generated]

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        sides = {name: getattr(settings, name) for name in SIDES}
        dims = [f"{name}.dim" for name, side in sides.items() if side.adapter == "manual" or "adapter" in forms(side)]
        found = [["hypernet.bottleneck"]] if any(forms(side) for side in sides.values()) else []
        return found + ([dims] if dims else [])

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        return settings.encoder.adapter in CONDITIONED

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        check_fields(config.method)
        for name in SIDES:
            check_side(name, config)

    def encode(self, run_encoder: RunEncoder, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        side = self.encoder
        if side.kind == "generated":
            first_pass = run_encoder(side.manual())
            return run_encoder(side.adaptation(side.embedding(first_pass, mask)))
        return run_encoder(side.adaptation(side.task_embedding(task_ids) if side.kind == "task" else None))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        conditioned = self.decoder.kind in CONDITIONED
        return self.decoder.adaptation(self.embed(hidden, mask, task_ids) if conditioned else None)

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        if self.decoder.kind == "generated":
            return self.decoder.embedding(hidden, mask)
        if self.decoder.kind == "task":
            return self.decoder.task_embedding(required(task_ids))
        return masked_mean(hidden, mask)

    def parts(self) -> dict[str, int]:
        found = {}
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            for part, module in side.named_children():
                found[f"{name}.{part}"] = sum(p.numel() for p in module.parameters())
            if side.scale is not None:
                found[f"{name}.scale"] = side.scale.numel()
        return found


def check_side(name: str, config: HyperdecoderConfig) -> None:
    """Raise UserError for values of a side's options that do not fit each other, the base, or the tasks."""
    method, side = config.method, getattr(config.method, name)
    if side.adapter == "task" and not config.tasks:
        raise UserError(f"method.{name}.adapter=task needs the names of the tasks that it is trained on")
    generated = forms(side)
    if set(generated) - set(FORMS) or len(set(generated)) < len(generated):
        raise UserError(f"method.{name}.form={side.form}: write adapter, lora, prefix, or several of them joined by +")
    if "lora" in generated:
        check_lora(method.lora)
        if name == "encoder" and method.lora.attention == "cross":
            raise UserError("method.lora.attention=cross: the encoder has no cross-attention; use self or all")
    if side.shared_layers is not None:
        sizes = stack_sizes(architecture(config.model), name)
        parse_layers(side.shared_layers, sizes.layers, f"method.{name}.shared_layers")


def check_fields(method: MethodSettings) -> None:
    """Raise UserError for values of single fields that are out of range."""
    for name in SIDES:
        side: SideSettings = getattr(method, name)
        if side.adapter not in KINDS:
            raise UserError(f"method.{name}.adapter={side.adapter}{nearest(side.adapter, KINDS)}")
        if side.input not in ("hidden", "layernorm"):
            raise UserError(f"method.{name}.input={side.input}{nearest(side.input, ['hidden', 'layernorm'])}")
        if side.adapter != "none" and side.dim < 1:
            raise UserError(f"method.{name}.dim={side.dim} must be at least 1")
        if not math.isfinite(side.scale):
            raise UserError(f"method.{name}.scale={side.scale} must be a finite number")
    hypernet = method.hypernet
    smallest = (
        ("hypernet.bottleneck", 1),
        ("hypernet.pools", 1),
        ("hypernet.layer_embedding", 0),
        ("prefix.length", 1),
    )
    for key, least in smallest:
        if get_option(method, key) < least:
            raise UserError(f"method.{key}={get_option(method, key)} must be at least {least}")
    if hypernet.conditioning not in ("mean", "attention"):
        known = nearest(hypernet.conditioning, ["mean", "attention"])
        raise UserError(f"method.hypernet.conditioning={hypernet.conditioning}{known}")


class AdapterBaseline(Hyperdecoder):
    """The adapter baseline (A.1): learned adapters in both stacks."""

    fixed = {"encoder.adapter": "manual", "decoder.adapter": "manual"}


class TaskHypernet(Hyperdecoder):
    """The task hypernet baseline (A.2): a hypernetwork for each stack, conditioned on a learned task embedding."""

    fixed = {"encoder.adapter": "task", "decoder.adapter": "task"}
