"""`hdscale prepare` and runs from the hub, against a stand-in for the hub, by the official client."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from hdscale.bases.fingerprint import fingerprint_weights
from hdscale.data.mirror import MANIFEST, Mirror, Wanted
from hdscale.data.pickled import convert_pickled, without_aliases
from hdscale.data.tasks.glue import REVISION
from hdscale.errors import UserError
from tests.helpers.hub_stand_in import StandIn
from tests.helpers.places import ROOT


def parquet(rows):
    """The bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def tiny_model(tied):
    """A T5 of a few thousand parameters."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, tie_word_embeddings=tied)
    return T5ForConditionalGeneration(config)


def pickled(tensors, legacy=False):
    """The bytes of a `.bin` file."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path):
    stand_in = StandIn()
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(20)]
    stand_in.add(
        "datasets",
        "nyu-mll/glue",
        {
            "README.md": b"not wanted",
            "cola/train-00000-of-00001.parquet": b"not wanted either",
            "rte/train-00000-of-00002.parquet": parquet(pairs[:12]),
            "rte/train-00001-of-00002.parquet": parquet(pairs[12:]),
            "rte/validation-00000-of-00001.parquet": parquet(pairs[:7]),
        },
        revision=REVISION,
    )
    # a data set with a script on its main branch: only the hub's own conversion has parquet
    documents = parquet([{"source": f"document {n}", "target": f"summary {n}"} for n in range(4)])
    stand_in.add("datasets", "GEM/wiki_lingua", {"wiki_lingua.py": b"raise SystemExit"})
    splits = {f"en/wiki_lingua-{split}.parquet": documents for split in ("train", "validation", "test", "sampled_test")}
    stand_in.add("datasets", "GEM/wiki_lingua", splits, revision="refs/convert/parquet")
    folder = tmp_path / "tokenizer"
    ByT5Tokenizer().save_pretrained(folder)
    tokenizer = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model(tied=True)
    stand_in.add(
        "models",
        "tiny/t5",
        {
            **tokenizer,
            "config.json": model.config.to_json_string().encode(),
            "pytorch_model.bin": pickled(model.state_dict()),
            "tf_model.h5": b"not wanted",
        },
    )
    untied = tiny_model(tied=False)
    stand_in.add(
        "models",
        "tiny/safe",
        {
            **tokenizer,
            "config.json": untied.config.to_json_string().encode(),
            "model.safetensors": save(without_aliases(dict(untied.state_dict()))),
            "pytorch_model.bin": b"not wanted",
        },
    )
    stand_in.add("models", "tiny/bare", {"config.json": b"{}"})
    address = stand_in.start()
    yield stand_in, address, model
    stand_in.stop()


def drive(address, tmp_path, *commands, **environment):
    """Run commands in one fresh process whose hub is the stand-in; [exit code, stdout, stderr] of each."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HDSCALE_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    variables.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in environment else None
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hub_driver"],
        input=json.dumps(commands),
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mirror_is_filled_resumed_checked_and_used_offline(hub, tmp_path):
    stand_in, address, model = hub
    (tmp_path / "c.yaml").write_text("data: {tasks: [rte, wiki_lingua]}\nmodel: {name: tiny/t5}\n")
    mirror = tmp_path / "mirror"
    prepare = ["prepare", "--config", "c.yaml", "--to", str(mirror)]
    weights = stand_in.repos["models", "tiny/t5"]["main"]["pytorch_model.bin"]
    stand_in.cut = dict.fromkeys(["pytorch_model.bin"], len(weights) // 2)

    first, second, verified = drive(
        address,
        tmp_path,
        [*prepare, "data.tasks=[rte]", "--no-weights"],
        [*prepare, "--any-size"],
        [*prepare, "--any-size", "--verify"],
    )
    assert first[0] == 2 and "rte train: 20 rows, the paper's table says 2490" in first[2]
    assert "--any-size" in first[2].splitlines()[-1]
    assert second[0] == verified[0] == 0, (second, verified)
    assert stand_in.fetched("rte/train-00000-of-00002.parquet") == 1
    assert stand_in.fetched("pytorch_model.bin") == 2  # the connection broke once
    assert f"data.root={mirror} model.name={mirror}/tiny/t5" in second[1]
    assert verified[1].startswith("0 of ")

    manifest = json.loads((mirror / "hdscale_manifest.json").read_text())
    files = manifest["files"]
    there = {path.relative_to(mirror).as_posix() for path in mirror.rglob("*") if path.is_file()}
    assert there == set(files) - {"tiny/t5/pytorch_model.bin"} | {"hdscale_manifest.json"}
    assert not [name for name in there if name.endswith((".md", ".h5", ".py")) or "cola" in name or "sampled" in name]
    assert files["GEM/wiki_lingua/en/wiki_lingua-test.parquet"]["revision"] == "refs/convert/parquet"
    assert all(len(record["commit"]) == 40 and len(record["sha256"]) == 64 for record in files.values())
    assert manifest["splits"] == {
        "rte": {"train": 20, "validation": 3, "test": 4},
        "wiki_lingua": {"train": 4, "validation": 4, "test": 4},
    }
    loaded = T5ForConditionalGeneration.from_pretrained(mirror / "tiny/t5")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert manifest["weights"]["tiny/t5"]["fingerprint"] == fingerprint_weights(mirror / "tiny/t5")

    # damage is found and repaired
    (mirror / "tiny/t5/model.safetensors").write_bytes(b"\0" * files["tiny/t5/model.safetensors"]["size"])
    (mirror / "nyu-mll/glue/rte/validation-00000-of-00001.parquet").unlink()
    (repaired,) = drive(address, tmp_path, [*prepare, "--any-size", "--verify"])
    assert repaired[0] == 0 and repaired[1].startswith("2 of ")
    assert json.loads((mirror / "hdscale_manifest.json").read_text())["files"] == files

    stand_in.requests.clear()
    local = [f"data.root={mirror}", f"model.tokenizer={mirror}/tiny/t5", "data.tasks=[rte,wiki_lingua]"]
    used, again = drive(address, tmp_path, ["examples", *local], prepare, HF_HUB_OFFLINE="1")
    assert used[0] == 0 and not stand_in.requests
    assert used[1].splitlines()[0] == "rte [('train-0', '0'), ('train-1', '1'), ('train-2', '0')]"
    assert again[0] == 2 and "HF_HUB_OFFLINE is set" in again[2]


def test_parts_are_left_out_and_missing_parts_named(hub, tmp_path):
    _, address, _ = hub
    (tmp_path / "c.yaml").write_text("data: {tasks: [rte]}\nmodel: {name: tiny/safe}\n")
    prepare = ["prepare", "--config", "c.yaml", "--to"]
    safe, words, bare, nowhere, built_in = drive(
        address,
        tmp_path,
        [*prepare, "safe", "--no-data"],
        [*prepare, "words", "--tokenizer-only"],
        [*prepare, "bare", "--no-data", "model.name=tiny/bare"],
        [*prepare, "nowhere", "--no-data", "model.name=tiny/none"],
        [*prepare, "built_in", "--no-data", "model.name=t5-v1_1-small"],
    )
    assert safe[0] == words[0] == built_in[0] == 0, (safe, words, built_in)
    files = {path.name for path in (tmp_path / "safe" / "tiny/safe").iterdir()}
    assert {"model.safetensors", "config.json"} <= files and "pytorch_model.bin" not in files
    assert "model.name=safe/tiny/safe" in safe[1] and "data.root" not in safe[1]
    assert not list((tmp_path / "words").rglob("*.safetensors")) and not list((tmp_path / "words").rglob("*.parquet"))
    assert "model.tokenizer=words/tiny/safe" in words[1]
    assert bare[0] == 2 and "hub model tiny/bare has no tokenizer" in bare[2]
    assert nowhere[0] == 2 and "there is no hub model 'tiny/none'" in nowhere[2]
    assert not list((tmp_path / "built_in").rglob("*.safetensors"))


def test_rows_come_from_the_hub_itself_and_then_from_its_cache(hub, tmp_path):
    stand_in, address, _ = hub
    rows = ["examples", "data.tasks=[rte,wiki_lingua]"]
    other = stand_in.add(
        "datasets",
        "nyu-mll/glue",
        {
            f"rte/{split}-00000-of-00001.parquet": parquet([{"sentence1": "x", "sentence2": "y", "label": 1}] * 2)
            for split in ("train", "validation")
        },
        revision="newer",
    )
    online = drive(
        address,
        tmp_path,
        rows,
        ["examples", "data.tasks=[rte]", "data.revisions={nyu-mll/glue: newer}"],
        ["examples", "data.tasks=[rte]", f"data.revision={other}"],
        ["examples", "data.tasks=[rte]", "data.revision=older"],
        ["examples", "data.tasks=[anli]"],
        ["examples", "data.tasks=[cola]"],
        ["examples", "data.tasks=[sst2]"],
    )
    assert online[0][:2] == [
        0,
        "rte [('train-0', '0'), ('train-1', '1'), ('train-2', '0')]\n"
        "wiki_lingua [('train-0', 'summary 0'), ('train-1', 'summary 1'), ('train-2', 'summary 2')]\n",
    ]
    assert online[1][1] == online[2][1] == "rte [('train-0', '1'), ('train-1', '1')]\n"
    for (code, _, error), message in zip(
        online[3:],
        [
            "no revision 'older'",
            "no hub data set 'facebook/anli'",
            "not a readable parquet",
            "no parquet file of split 'train' in 'sst2'",
        ],
        strict=True,
    ):
        assert code == 2 and message in error and len(error.splitlines()) == 1, error
    stand_in.requests.clear()
    cached, missing = drive(address, tmp_path, rows, ["examples", "data.tasks=[xsum]"], HF_HUB_OFFLINE="1")
    assert cached[:2] == online[0][:2] and not stand_in.requests
    assert missing[0] == 2 and "hdscale prepare" in missing[2] and "data.root=DIR" in missing[2]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_pickled_weights_become_safetensors(tmp_path, legacy, tied):
    model = tiny_model(tied)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    state = model.state_dict()
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        (tmp_path / file).write_bytes(pickled({name: state[name] for name in part}, legacy))
    assert convert_pickled(tmp_path, list(halves)) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in found)
    model.config.save_pretrained(tmp_path)
    for file in halves:
        (tmp_path / file).unlink()
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_tied_tensors_keep_the_name_that_t5_loads(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickled(tiny_model(tied=True).state_dict()))
    convert_pickled(tmp_path, ["pytorch_model.bin"])
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "shared.weight" in names and not names & {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }


class Malicious:
    def __reduce__(self):
        return os.system, ("touch run_by_unpickling",)


@pytest.mark.parametrize("content", [{"a": Malicious()}, {"a": 1}, [1, 2]])
def test_nothing_but_tensors_is_unpickled(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickled(content))
    with pytest.raises(UserError, match="pytorch_model.bin: "):
        convert_pickled(tmp_path, ["pytorch_model.bin"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut off")
    with pytest.raises(UserError, match="fetch it again"):
        convert_pickled(tmp_path, ["pytorch_model.bin"])


def wanted(size, checksum=None):
    return Wanted("tiny/t5", "model", "main", "0" * 40, "model.safetensors", size, checksum)


def test_a_mirror_that_cannot_be_filled(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--to .*file"):
        Mirror(tmp_path / "file")
    (tmp_path / "old").mkdir()
    for text, message in (("{", "damaged"), ("[]", "damaged"), ('{"format": 99}', "another version")):
        (tmp_path / "old" / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=message):
            Mirror(tmp_path / "old")
    with pytest.raises(UserError, match="1000000000.0 GB are needed there, but .* are free"):
        Mirror(tmp_path / "new").fetch([wanted(10**18)])

    def another_file(*_, local_dir, **__):
        Path(local_dir).mkdir(parents=True)
        (Path(local_dir) / "model.safetensors").write_bytes(b"damaged")
        return str(Path(local_dir) / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", another_file)
    with pytest.raises(UserError, match="content differs from the hub's checksum"):
        Mirror(tmp_path / "new").fetch([wanted(7, "0" * 64)])
    assert not (tmp_path / "new" / "tiny/t5/model.safetensors").exists()
