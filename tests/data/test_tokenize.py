"""The token cache: content, key, sharing among processes, damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import tomllib
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from hdscale.data import tokenize
from hdscale.data.settings import DataSettings
from hdscale.data.sources import load_examples
from hdscale.data.tasks import expand_tasks, get_task
from hdscale.data.tasks.sizes import TABLE_10
from hdscale.data.tokenize import cache_key, load_tokenizer, tokenized_split, tokenizer_fingerprint
from hdscale.errors import UserError
from tests.helpers.places import HUB, ROOT, T5_TOKENIZER, needs_real_text


@pytest.fixture(scope="module")
def t5():
    return load_tokenizer(str(T5_TOKENIZER))


@pytest.fixture
def bytes_tokenizer():
    return ByT5Tokenizer()


@pytest.fixture
def settings(tmp_path):
    return DataSettings(cache=str(tmp_path / "cache"), max_source_length=64, max_target_length=8)


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["short", "é" * 100, "third row"]
    path.write_text("".join(json.dumps({"text": text, "label": "no"}) + "\n" for text in texts))
    return get_task(
        {
            "name": "mine",
            "kind": "label",
            "source": "say: {text}",
            "target": "{label}",
            "labels": ["no", "yes"],
            "files": {"train": str(path)},
        }
    )


def test_rows_are_the_tokenizers_ids_cut_with_the_end_kept(task, settings, bytes_tokenizer):
    rows = tokenized_split(task, "train", bytes_tokenizer, settings)
    examples = load_examples(task, "train", settings)
    assert len(rows) == len(examples) == 3
    for index, example in enumerate(examples):
        row = rows.row(index, task_id=4)
        whole = bytes_tokenizer(example.source).input_ids
        assert row.input_ids == (whole if len(whole) <= 64 else [*whole[:63], bytes_tokenizer.eos_token_id])
        assert row.labels == bytes_tokenizer(example.target).input_ids
        assert (row.id, row.task, row.task_id) == (example.id, "mine", 4)
    assert rows.source_lengths.tolist() == [len(rows.row(index).input_ids) for index in range(3)]
    assert rows.target_lengths.tolist() == [3, 3, 3]
    assert isinstance(rows._values["source"].base, np.memmap)
    with pytest.raises(IndexError):
        rows.row(3)


def test_built_once(task, settings, bytes_tokenizer, monkeypatch):
    first = tokenized_split(task, "train", bytes_tokenizer, settings)
    monkeypatch.setattr(tokenize, "build", lambda *_: pytest.fail("built again"))
    assert tokenized_split(task, "train", bytes_tokenizer, settings).folder == first.folder
    unrelated = replace(task, metrics=("f1",), sizes={"train": 3})
    assert tokenized_split(unrelated, "train", bytes_tokenizer, settings).folder == first.folder


def test_the_key_is_the_content(task, settings, bytes_tokenizer, tmp_path):
    def key(task=task, tokenizer=bytes_tokenizer, **changes):
        return cache_key(task, "train", tokenizer, replace(settings, **changes))

    keys = [
        key(),
        key(max_source_length=65),
        key(max_target_length=9),
        key(task=replace(task, source="{text}")),
        key(task=replace(task, splits={"train": replace(task.splits["train"], part="held_out")})),
        key(tokenizer=ByT5Tokenizer(extra_ids=3)),
    ]
    assert key() == keys[0]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert key(task=replace(task, files={"train": (str(copy),)})) == keys[0]
    with open(copy, "a") as file:
        file.write('{"text": "one more", "label": "yes"}\n')
    keys.append(key(task=replace(task, files={"train": (str(copy),)})))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["cut", "missing", "meta"])
def test_a_torn_entry_is_built_again(task, settings, bytes_tokenizer, damage, caplog):
    rows = tokenized_split(task, "train", bytes_tokenizer, settings)
    wanted = [rows.row(index) for index in range(3)]
    folder = rows.folder
    del rows
    if damage == "cut":
        os.truncate(folder / "source.bin", 10)
    elif damage == "missing":
        (folder / "ids_ends.bin").unlink()
    else:
        (folder / "meta.json").write_text("{")
    again = tokenized_split(task, "train", bytes_tokenizer, settings)
    assert [again.row(index) for index in range(3)] == wanted
    assert "incomplete" in caplog.text


def test_a_faulty_row_leaves_nothing_behind(task, settings, bytes_tokenizer, tmp_path):
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"text": "x", "label": "maybe"}\n')
    with pytest.raises(UserError, match="line 4: label 'maybe'"):
        tokenized_split(task, "train", bytes_tokenizer, settings)
    left = list((tmp_path / "cache" / "tokenized").iterdir())
    assert [path for path in left if path.is_dir()] == []


def test_unusable_caches_and_lengths(task, settings, bytes_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set data.cache"):
        tokenized_split(task, "train", bytes_tokenizer, replace(settings, cache=str(tmp_path / "file" / "x")))
    with pytest.raises(UserError, match="data.max_source_length=1"):
        tokenized_split(task, "train", bytes_tokenizer, replace(settings, max_source_length=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenize, "write", full)
    with pytest.raises(UserError, match="No space left.*free some space, or set data.cache"):
        tokenized_split(task, "train", bytes_tokenizer, settings)


def one_process(task, settings, started, results):
    started.wait()
    rows = tokenized_split(task, "train", ByT5Tokenizer(), settings)
    results.put((os.getpid(), str(rows.folder), [rows.row(index) for index in range(len(rows))]))


def test_processes_share_one_build(task, settings, tmp_path):
    context = multiprocessing.get_context("fork")
    started, results = context.Event(), context.Queue()
    processes = [context.Process(target=one_process, args=(task, settings, started, results)) for _ in range(4)]
    for process in processes:
        process.start()
    started.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({folder for _, folder, _ in found}) == 1
    assert all(rows == found[0][2] for _, _, rows in found)
    assert len([path for path in (tmp_path / "cache" / "tokenized").iterdir() if path.is_dir()]) == 1


def no_locks(self, *_, **__):
    raise NotImplementedError("no locks here")


def test_without_file_locks_the_first_rename_wins(task, settings, bytes_tokenizer, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    write, seen = tokenize.write, []

    def slow_write(folder, *arguments):
        write(folder, *arguments)
        if not seen:  # while one process writes, another one comes, and is done first
            seen.append(folder)
            seen.append(tokenized_split(task, "train", bytes_tokenizer, settings))
            assert folder.is_dir()

    monkeypatch.setattr(tokenize, "write", slow_write)
    rows = tokenized_split(task, "train", bytes_tokenizer, settings)
    assert len(rows) == 3 and not seen[0].exists()
    assert [rows.row(index) for index in range(3)] == [seen[1].row(index) for index in range(3)]


def test_leftovers_of_a_killed_build_are_removed(task, settings, bytes_tokenizer):
    folder = tokenized_split(task, "train", bytes_tokenizer, settings).folder
    os.truncate(folder / "ids.bin", 1)
    leftover = folder.parent / f".{folder.name}.abc"
    leftover.mkdir()
    assert len(tokenized_split(task, "train", bytes_tokenizer, settings)) == 3
    assert not leftover.exists()


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for name in (str(tmp_path), str(tmp_path / "nowhere"), None):
        with pytest.raises(UserError, match="set model.tokenizer") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_of_bytes_is_one(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("ab").input_ids == [100, 101, 1]


@needs_real_text
def test_t5s_real_vocabulary(t5, settings):
    assert t5.is_fast and t5("Hello world").input_ids[-1] == t5.eos_token_id == 1
    before = tokenizer_fingerprint(t5)
    t5(["a", "b c"], padding=True, truncation=True, max_length=5)
    fresh = AutoTokenizer.from_pretrained(str(T5_TOKENIZER))
    assert tokenizer_fingerprint(fresh) == before
    fresh.add_tokens(["<new>"])
    assert tokenizer_fingerprint(fresh) != before


@needs_real_text
@pytest.mark.slow
def test_mean_source_length_of_glue(t5, tmp_path):
    settings = DataSettings(root=str(HUB), cache=str(tmp_path))
    means = {
        task.name: tokenized_split(task, "train", t5, settings).source_lengths.mean() for task in expand_tasks(["glue"])
    }
    assert means["rte"] == pytest.approx(78.6, abs=0.1) and means["qnli"] == pytest.approx(62.8, abs=0.1)
    total = sum(sizes["train"] for sizes in TABLE_10.values())
    mixed = sum(TABLE_10[name]["train"] * mean for name, mean in means.items()) / total
    assert mixed == pytest.approx(45.8, abs=0.3)


def test_a_spiece_model_alone_is_enough(tmp_path):
    """T5's own bases ship no tokenizer.json. Fails without sentencepiece, or protobuf, with which it is converted."""
    import sentencepiece

    text = "the cat sat on the mat while the dog ran over a hill and an old bird sang to no one at all".split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(text[start:] + text[:start]) for start in range(len(text))]),
        model_prefix=str(tmp_path / "spiece"), vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("the cat sat on a hill").input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat sat on a hill"


def test_what_reads_a_spiece_model_comes_with_hdscale():
    """Fails if either is only an extra's: a bare installation could not read T5's own tokenizer."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {"sentencepiece", "protobuf"} <= {requirement.split(">")[0] for requirement in declared}
