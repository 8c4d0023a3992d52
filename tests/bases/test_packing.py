"""A packed encoder computes what the padded one does: outputs, losses, gradients, and FlexAttention's mask and bias."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode

from hdscale.bases import t5
from hdscale.bases.attention import Heads
from hdscale.bases.interface import Source
from hdscale.bases.loading import load_base
from hdscale.bases.packing import BLOCK, Packed, block_mask_of
from hdscale.bases.positions import Buckets, bias_matrix
from hdscale.bases.settings import ModelSettings
from hdscale.config import load_config
from hdscale.data.batches import Row, collate
from hdscale.data.micro_batches import deal
from hdscale.errors import UserError
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling.methods import check_method
from tests.helpers.adapted import TASKS, VOCABULARY, method_config, shaken, tiny_base
from tests.helpers.products import Linears

SIZES = dict(encoder__dim=4, decoder__dim=3, hypernet__bottleneck=6)
METHODS = {
    "hyperdecoder": ("hyperdecoder", SIZES),
    "adapter": ("adapter", dict(encoder__dim=4, decoder__dim=4)),
    "lora": ("lora", dict(lora__rank=2)),
    "full_finetuning": ("full_finetuning", {}),
}
LENGTHS = {
    "random": (5, 13, 13, 2, 9, 13, 1),
    "one row": (11,),
    "one token in each": (1, 1, 1),
    "a row of one token": (6, 1),
    "no padding": (7, 7, 7),
}


@pytest.fixture(scope="module", params=["v1.0", "v1.1", "mt5", "umt5"])
def family(request, tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("bases") / request.param, request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "v1.1")


def rows_of(lengths, seed: int = 0) -> list[Row]:
    generator = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(2, VOCABULARY) for _ in range(length)]

    return [Row(tokens(length), tokens(generator.randint(1, 6)), index % len(TASKS), str(index), "t")
            for index, length in enumerate(lengths)]  # fmt: skip


def pair(base, method: str, options: dict, **model_options):
    """The same model twice: padded, and packed."""
    models = []
    for packed in (False, True):
        config = method_config(base, method, **options)
        config.model.packing = packed
        for key, value in model_options.items():
            setattr(config.model, key, value)
        models.append(shaken(build_model(config)).train())
    return models


def gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the mean over all target tokens of the batches."""
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss_sum / count
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, tolerance: float = 1e-5) -> None:
    """Losses, and gradients relative to the largest entry of each."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, gradient in wanted[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max().clamp(min=1e-3), f"{name}: {error}"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_states_are_the_padded_ones_at_tokens_and_zero_elsewhere(family, lengths):
    padded, packed = pair(family, "hyperdecoder", SIZES)
    batch = collate(rows_of(lengths), 0)
    source = batch["input_ids"], batch["attention_mask"], batch["task_ids"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = padded.encode(*source).hidden
        found = packed.encode(*source, batch["source_positions"]).hidden
        assert torch.equal(found, packed.encode(*source).hidden)  # looked up, where nobody says it
        assert (found - wanted)[mask].abs().max() < 1e-5
        assert not found[~mask].any()
        assert float(packed(**batch).loss_sum) == pytest.approx(float(padded(**batch).loss_sum), rel=1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "encoder", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_packed_gradients_are_the_padded_ones(base, name, checkpointing):
    method, options = METHODS[name]
    padded, packed = pair(base, method, options, activation_checkpointing=checkpointing)
    batch = collate(rows_of(LENGTHS["random"]), 0)
    assert_same(gradients(packed, [batch]), gradients(padded, [batch]))
    if name == "full_finetuning":
        assert bias_of(packed, 0).grad.abs().max() > 0


def bias_of(model, layer: int) -> Tensor:
    """The encoder's relative position biases of a layer."""
    return model.base.encoder.block[layer].layer[0].SelfAttention.relative_attention_bias.weight


def test_packed_gradients_where_every_layer_has_biases_of_its_own(tmp_path):
    padded, packed = pair(tiny_base(tmp_path / "umt5", "umt5"), "full_finetuning", {})
    batch = collate(rows_of(LENGTHS["random"]), 0)
    assert_same(gradients(packed, [batch]), gradients(padded, [batch]))
    assert bias_of(packed, 0).grad.abs().max() > 0 and bias_of(packed, 1).grad.abs().max() > 0
    assert not torch.equal(bias_of(packed, 0).grad, bias_of(packed, 1).grad)


@pytest.mark.parametrize("cut", [dict(micro_batch_size=3), dict(tokens_per_micro_batch=60)], ids=["rows", "tokens"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["hyperdecoder", "adapter"])
def test_sorted_micro_batches_have_the_gradient_of_one_padded_pass(base, name, packed, world_size, cut):
    """Loss and gradients of a global batch that is sorted, cut and distributed to ranks, summed over all."""
    method, options = METHODS[name]
    whole, cut_up = pair(base, method, options)[0], pair(base, method, options)[packed]
    rows = rows_of([random.Random(4).randint(1, 24) for _ in range(16)], seed=1)
    parts = [part for parts in deal(rows, world_size, **cut) for part in parts]
    assert len(parts) > 3
    found = gradients(cut_up, [collate(part, 0) for part in parts])
    assert_same(found, gradients(whole, [collate(rows, 0)]))
    assert sorted(found[1]) == sorted(whole.trainable_names())


def packing_of(lengths, heads: int, pad: int = 0, seed: int = 0) -> tuple[Packed, Tensor]:
    """A packed sequence, and biases by the distance of key and query [H, 2 S - 1]."""
    batch = collate(rows_of(lengths), 0)
    size_b, size_s = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(seed)
    by_distance = torch.randn(heads, 2 * size_s - 1, generator=generator)
    positions = F.pad(batch["source_positions"], (0, pad), value=size_b * size_s)
    source = Source(batch["input_ids"], batch["attention_mask"], positions)
    packed = Packed(Heads(heads, 8), source, Buckets(32, 128, both_ways=True))
    # on a CPU nothing needs it but these tests
    packed.block_mask = block_mask_of(packed.rows)
    return packed, by_distance


MANY = [random.Random(7).randint(1, 90) for _ in range(12)]
"""Tokens of several blocks, instances across their borders."""


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), MANY], ids=[*LENGTHS, "several blocks"])
def test_flex_attention_computes_what_the_cpu_does(lengths):
    """Mask and score of FlexAttention, as the GPU's kernel is given them, against attention instance by instance."""
    heads, size = 3, 8
    packed, by_distance = packing_of(lengths, heads, pad=-sum(lengths) % BLOCK)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, packed.positions.shape[0], size, generator=generator) for _ in range(3))
    found = packed.attend_flexibly(query, key, value, by_distance, flex_attention)
    assert not found.isnan().any()  # padding sees padding
    wanted = packed.attend_by_instance(query, key, value, bias_matrix(by_distance))
    assert (found - wanted)[:, :, :total].abs().max() < 1e-5


def test_gradients_of_the_flex_attention_that_a_gpu_computes(monkeypatch):
    """PyTorch's kernels have no backward pass on a CPU; its own definition of FlexAttention has one.

    Of queries, keys, values and, as in full fine-tuning, of the position bias.
    """
    flex = sys.modules[flex_attention.__module__]
    if not hasattr(flex, "_validate_device"):
        pytest.skip("this PyTorch has no check of the device under the name known here")
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    heads, size, lengths = 2, 8, MANY[:5]
    results = []
    for kind in ("flex", "instances"):
        packed, by_distance = packing_of(lengths, heads)
        by_distance.requires_grad_()
        generator = torch.Generator().manual_seed(1)
        own = [torch.randn(1, heads, sum(lengths), size, generator=generator).requires_grad_() for _ in range(3)]
        if kind == "flex":
            output = packed.attend_flexibly(*own, by_distance, flex_attention)
        else:
            output = packed.attend_by_instance(*own, bias_matrix(by_distance))
        output.backward(torch.cos(torch.arange(output.numel()).view_as(output)))
        results.append([output.detach(), *(one.grad for one in own), by_distance.grad])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_flex_attention_is_traced_once_for_many_lengths():
    """What `torch.compile` traces, run without making kernels of it: the same numbers, and no graph for each length."""
    kernel = torch.compile(flex_attention, dynamic=True, backend="aot_eager")
    heads, size = 2, 16
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    count = torch._dynamo.utils.counters["stats"]
    graphs = []
    with torch.no_grad():
        for number in range(6):
            lengths = [random.Random(number).randint(1, 60 + 20 * number) for _ in range(6 + number)]
            packed, by_distance = packing_of(lengths, heads, pad=-sum(lengths) % BLOCK, seed=number)
            generator = torch.Generator().manual_seed(1)
            own = [torch.randn(1, heads, packed.positions.shape[0], size, generator=generator) for _ in range(3)]
            found = packed.attend_flexibly(*own, by_distance, kernel)
            wanted = packed.attend_by_instance(*own, bias_matrix(by_distance))
            assert (found - wanted)[:, :, : sum(lengths)].abs().max() < 1e-5
            graphs.append(count["unique_graphs"])
    assert graphs[-1] == graphs[2] <= 3, graphs


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), MANY, [300, 128, 84], [BLOCK] * 3], ids=str)
@pytest.mark.parametrize("pad", [True, False])
def test_the_block_mask_is_that_of_looking_at_all_pairs(lengths, pad):
    rows = packing_of(lengths, 1, pad=-sum(lengths) % BLOCK if pad else 0)[0].rows
    found = block_mask_of(rows)
    wanted = create_block_mask(
        lambda b, h, q, k: rows[q] == rows[k], None, None, len(rows), len(rows), "cpu", BLOCK_SIZE=BLOCK
    )
    assert torch.equal(found.to_dense(), wanted.to_dense())
    # blocks that need no look at their tokens: never more than there are, and of one long instance those in its middle
    assert torch.all(found.full_kv_num_blocks <= wanted.full_kv_num_blocks)
    if lengths == [300, 128, 84]:
        assert found.full_kv_num_blocks.flatten().tolist()[:2] == [2, 2]


def test_the_seen_pairs_are_what_flex_attention_computes():
    """Blocks of two instances are left out: of ten instances of one block each, a tenth of all pairs is computed."""
    assert block_mask_of(packing_of([BLOCK] * 10, 1)[0].rows).sparsity() == pytest.approx(90.0)


def test_a_packed_pass_computes_no_padding(base):
    """Linears of the encoder see the real tokens alone."""
    _, packed = pair(base, "adapter", METHODS["adapter"][1])
    with Linears(packed.base) as linears:
        packed(**collate(rows_of((20, 1, 1, 3)), 0))
    seen = [tuple(output.shape[:-1]) for name, output in linears.outputs.items() if name.startswith("encoder.")]
    # seven linears in each of two layers
    assert seen == [(25,)] * 14


def test_evaluation_is_not_packed(base, monkeypatch):
    padded, packed = pair(base, "hyperdecoder", SIZES)
    monkeypatch.setattr(t5, "Packed", lambda *_: pytest.fail("packed"))
    batch = collate(rows_of((5, 3)), 0)
    ids = [
        model.eval().generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4)
        for model in (padded, packed)
    ]
    assert torch.equal(*ids)
    with pytest.raises(pytest.fail.Exception, match="packed"):
        packed.train()(**batch)


class Attentions(TorchFunctionMode):
    """All fused attentions inside a `with`: queries, keys, values, mask and the output of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[Tensor], Tensor, Tensor]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            self.seen.append((list(args), kwargs["attn_mask"], output))
        return output

    def without_dropout(self) -> list[bool]:
        """Of each attention: whether the output is the one that it has without dropout."""
        return [
            torch.allclose(output, F.scaled_dot_product_attention(*own, attn_mask=mask, scale=1.0), atol=1e-6)
            for own, mask, output in self.seen
        ]


def test_dropout_of_probabilities_is_left_out_and_no_other(base):
    """Packed, the encoder differs from pass to pass by its other dropouts; its attention has none."""
    padded, packed = pair(base, "adapter", METHODS["adapter"][1], dropout=0.5)
    batch = collate(rows_of((5, 9, 2)), 0)
    source = batch["input_ids"], batch["attention_mask"], batch["task_ids"]
    with Attentions() as attentions:
        hidden = [packed.encode(*source).hidden for _ in range(2)]
    # two passes of two layers, and three lengths in each
    assert attentions.without_dropout() == [True] * 12
    assert not torch.allclose(*hidden)
    with Attentions() as attentions:
        padded.encode(*source)
    assert attentions.without_dropout() == [False] * 2


@pytest.mark.parametrize(
    "method, options",
    [
        ("hyperdecoder", {"encoder": {"adapter": "generated"}}),
        ("hyperdecoder", {"encoder": {"adapter": "task"}}),
        ("task_hypernet", {}),
        ("modular", {}),
        ("hyperformer", {}),
        ("hyperformer++", {}),
        ("hyperprompt", {}),
    ],
)
def test_methods_with_an_encoder_for_each_instance_refuse(method, options):
    config = HyperdecoderConfig.from_dict(
        {"model": {"name": "/nowhere/at/all", "packing": True}, "method": {"name": method, **options}, "tasks": TASKS}
    )
    with pytest.raises(
        UserError, match=f"model.packing=true: method '{method.replace('+', '.')}' .* use model.packing=false"
    ):
        check_method(config)


def test_heads_that_are_too_small_for_a_gpu_are_refused_before_anything_is_loaded(base):
    """FlexAttention does not compile for heads below 16 numbers (seen on an H200 with torch 2.11)."""
    with pytest.raises(UserError, match="needs heads of at least 16 numbers on a GPU, and .* has 8; use model.packing"):
        load_base(ModelSettings(name=str(base), packing=True), torch.float32, "cuda")


def test_packing_has_an_attention_of_its_own():
    config = HyperdecoderConfig.from_dict({"model": {"name": "tiny-1", "packing": True, "attention": "eager"}})
    with pytest.raises(UserError, match="leave out model.attention=eager"):
        build_model(config)


def test_packing_is_off_unless_asked_for():
    assert load_config(None, []).model.packing is False
