"""Loading at scale: the same model as transformers loads, and how much host memory each rank needs for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from hdscale.bases.interface import Base, Source
from hdscale.bases.loading import load_base
from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError
from tests.helpers.adapted import relative_error

FAMILIES = {
    "v1.0": (T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "relu"}),
    "v1.1": (T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5Config, MT5ForConditionalGeneration, {}),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration, {}),
    "umt5, tied": (UMT5Config, UMT5ForConditionalGeneration, {}),
}
TIED = ("v1.0", "umt5, tied")


def save_checkpoint(folder: Path, family: str, dtype=torch.float32, shard="1GB", **sizes) -> Path:
    """A random checkpoint as the hub has them: head and embeddings tied for v1.0, apart for the others.

    A UMT5 with a tied head is among them, because its output is computed in another way.
    """
    config_class, model_class, options = FAMILIES[family]
    sizes = {
        "vocab_size": 100,
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        **sizes,
    }
    config = config_class(**sizes, **options, decoder_start_token_id=0, tie_word_embeddings=family in TIED)
    torch.manual_seed(0)
    model = model_class(config)
    if family not in TIED:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    for parameter in (p for p in model.parameters() if p.ndim == 1):
        # norms that do something
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    # transformers 5 writes "tied" for every UMT5; the files of the hub say what is true
    change_config(folder, tie_word_embeddings=family in TIED)
    return folder


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def loaded_by_transformers(folder: Path, dtype: torch.dtype):
    """The model of transformers.

    Up to 5.23 it takes every UMT5 for tied, and multiplies the decoder's output accordingly even if it has loaded a
    head of its own.
    """
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)
    if model.config.model_type == "umt5":
        model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight
    return model


BATCH = {
    "input_ids": torch.randint(2, 100, (3, 40), generator=torch.Generator().manual_seed(1)),
    "attention_mask": (torch.arange(40) < torch.tensor([[40], [23], [1]])).long(),
    "labels": torch.randint(2, 100, (3, 30), generator=torch.Generator().manual_seed(2)),
}
"""More distances between tokens than there are biases for."""


def logits_of(base: Base) -> torch.Tensor:
    """[B, T, V] for `BATCH`."""
    encoding = base.encode(Source(BATCH["input_ids"], BATCH["attention_mask"]))
    return base.head(base.decode(base.decoder_inputs(BATCH["labels"]), encoding))


def assert_same_weights(ours: Base, theirs: torch.nn.Module, dtype: torch.dtype) -> None:
    """The same names in the same order, and the same bits."""
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_transformers_loads(tmp_path, family, dtype, tolerance):
    """Every weight to the bit, and logits that differ by rounding."""
    folder = save_checkpoint(tmp_path, family, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours, theirs = load_base(ModelSettings(name=str(folder)), dtype), loaded_by_transformers(folder, dtype)
    assert_same_weights(ours, theirs, dtype)
    assert (ours.lm_head.weight is ours.shared.weight) == (family in TIED)
    assert ours.training == theirs.training
    with torch.no_grad():
        found, expected = logits_of(ours), theirs(**BATCH).logits
    assert found.dtype == dtype
    assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_safetensors(tmp_path, family):
    """Older ones are a pickled state dict, in which tied weights have an entry each."""
    folder = save_checkpoint(tmp_path, family)
    theirs = loaded_by_transformers(folder, torch.float32)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    ours = load_base(ModelSettings(name=str(folder)), torch.float32)
    assert_same_weights(ours, theirs, torch.float32)
    assert (ours.lm_head.weight is ours.shared.weight) == (family in TIED)
    with torch.no_grad():
        assert relative_error(logits_of(ours), theirs(**BATCH).logits) <= 1e-5


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_may_name_the_embeddings_after_a_stack(tmp_path, family, name):
    folder = save_checkpoint(tmp_path, family)
    theirs = loaded_by_transformers(folder, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors.pop("shared.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = load_base(ModelSettings(name=str(folder)), torch.float32)
    assert_same_weights(ours, theirs, torch.float32)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "not a complete safetensors file"),
        (lambda folder: change_config(folder, d_ff=64), "config.json says"),
        (lambda folder: change_config(folder, num_layers=3), "are missing"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path, damage, says):
    folder = save_checkpoint(tmp_path, "v1.1")
    damage(folder)
    with pytest.raises(UserError, match=says):
        load_base(ModelSettings(name=str(folder)), torch.float32)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    folder = save_checkpoint(tmp_path, "v1.1", shard="20KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(UserError, match="lacks model-00001"):
        load_base(ModelSettings(name=str(folder)), torch.float32)


# One rank: its private memory (not mapped from files, which the ranks share) before and after loading,
# and the peak while loading, sampled by the kernel.
RANK = """
import sys, threading, time, json, torch
from hdscale.bases.loading import load_base
from hdscale.bases.settings import ModelSettings
import transformers

def own():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024

tiny, folder, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_base(ModelSettings(name=tiny), dtype)  # imports and arenas
before, peak, stop = own(), 0.0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, own())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load_base(ModelSettings(name=folder), dtype)
total = sum(float(p.flatten()[::512].float().sum()) for p in model.parameters())  # touch every page
stop = True
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(json.dumps({"size": size, "own": own() - before, "peak": peak - before, "total": total}))
"""


def load_in_ranks(tmp_path: Path, checkpoint_dtype: torch.dtype, dtype: str, ranks: int) -> list[dict[str, float]]:
    tiny = save_checkpoint(tmp_path / "tiny", "v1.1")
    big = save_checkpoint(
        tmp_path / "big", "v1.1", checkpoint_dtype, "100MB",
        vocab_size=16000, d_model=768, d_ff=2048, d_kv=64, num_heads=12, num_layers=5,
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tiny), str(big), dtype],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(ranks)
    ]
    return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]


def test_ranks_share_the_pages_of_a_checkpoint_in_their_dtype(tmp_path):
    for rank in load_in_ranks(tmp_path, torch.bfloat16, "bfloat16", ranks=2):
        print(rank)
        assert rank["size"] > 150  # MiB
        assert rank["peak"] < 0.15 * rank["size"], rank
        assert rank["total"] != 0


@pytest.mark.slow
def test_converting_needs_the_result_and_one_tensor(tmp_path):
    """A float32 checkpoint read in bf16 cannot be shared, but is never held in float32 as a whole."""
    (rank,) = load_in_ranks(tmp_path, torch.float32, "bfloat16", ranks=1)
    print(rank)
    assert rank["own"] == pytest.approx(rank["size"], rel=0.25)
    assert rank["peak"] < 1.5 * rank["size"]
