"""Loading at scale: the same model as transformers loads, and how much host memory each rank needs for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hdscale.bases.loading import load_base
from hdscale.bases.blocks import adapt_blocks
from hdscale.bases.settings import ModelSettings
from hdscale.errors import UserError

FAMILIES = {
    "v1.0": (T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "relu"}),
    "v1.1": (T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5Config, MT5ForConditionalGeneration, {}),
}


def save_checkpoint(folder: Path, family: str, dtype=torch.float32, shard="1GB", **sizes) -> Path:
    """A random checkpoint as the hub has them: head and embeddings tied for v1.0, apart for the others."""
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
    config = config_class(**sizes, **options, decoder_start_token_id=0, tie_word_embeddings=family == "v1.0")
    torch.manual_seed(0)
    model = model_class(config)
    if family != "v1.0":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_transformers_loads(tmp_path, family, dtype):
    folder = save_checkpoint(tmp_path, family, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = load_base(ModelSettings(name=str(folder)), dtype)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.training == theirs.training
    ids = torch.randint(2, 100, (2, 5))
    # the same computation on both sides, so that only what was loaded can differ
    adapt_blocks(theirs)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids, labels=ids).logits, theirs(input_ids=ids, labels=ids).logits, rtol=0, atol=0
        )


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


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
