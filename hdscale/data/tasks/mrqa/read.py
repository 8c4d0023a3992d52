"""The MRQA 2019 shared task (Section 3.1.2): its twelve sets, read from its own files or from the hub's form.

Its own files are `{train,dev}/<Set>.jsonl.gz` (or `.jsonl`): an optional header line, then one context a line
with its questions. `char_spans` count code points and end inclusively. The hub's form (`mrqa-workshop/mrqa`)
has one question a row and all sets in one file.

How oddities are handled:
- a question that repeats an earlier one of its set (same qid, question and context) is left out; another
  question under the same qid is kept, its id is `<qid>~2`, and the official form of predictions keeps the
  last of them;
- a question without a detected answer, or with an empty context, is kept: its target is the empty string;
- lone surrogates, which JSON can state and UTF-8 cannot, become U+FFFD (one for one, so that offsets hold);
- white space at the ends of a span is not part of the answer.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hdscale.data import hub
from hdscale.data.checksums import file_checksum
from hdscale.data.settings import DataSettings
from hdscale.data.tables import json_rows, open_parquet
from hdscale.data.tasks.mrqa.chunks import chunks_of_questions
from hdscale.data.tasks.sizes import TABLE_11
from hdscale.data.tasks.task import Decoding, Example, SplitRule, Task
from hdscale.errors import UserError

REPO = "mrqa-workshop/mrqa"
IN_DOMAIN = {
    "squad": "SQuAD",
    "hotpotqa": "HotpotQA",
    "triviaqa": "TriviaQA-web",
    "newsqa": "NewsQA",
    "searchqa": "SearchQA",
    "naturalquestions": "NaturalQuestionsShort",
}
"""{task: name of its files and of the hub's subset}: trained on and evaluated on (Table 4)."""
OUT_OF_DOMAIN = {
    "bioasq": "BioASQ",
    "drop": "DROP",
    "duorc": "DuoRC.ParaphraseRC",
    "race": "RACE",
    "relationextraction": "RelationExtraction",
    "textbookqa": "TextbookQA",
}
"""Only evaluated on (Table 5)."""
MIXTURES = {
    "mrqa": (*IN_DOMAIN, *OUT_OF_DOMAIN),
    "mrqa_in_domain": tuple(IN_DOMAIN),
    "mrqa_out_of_domain": tuple(OUT_OF_DOMAIN),
}
FOLDERS = {"train": "train", "validation": "dev", "test": "dev"}
"""{split of the hub's form: folder of the shared task's own files}."""
MAX_ANSWER_TOKENS = 64
TEMPLATE = "question: {question} context: {context}"
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Question(Example):
    """A question with its whole context; `source` is the prompt, `target` the first answer found,
    `references` all gold answers.
    """

    qid: str = ""
    question: str = ""
    begin: int = 0
    """Where the question begins in the prompt."""
    context: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    """(first, last) character of every detected answer in the context, inclusive, in the order of the file.
    """


def tasks(settings: DataSettings) -> list[Task]:
    """The twelve declarations. A set has one labelled evaluation split, which both validates and tests."""
    return [declare(name, stem, "validation") for name, stem in IN_DOMAIN.items()] + [
        declare(name, stem, "test") for name, stem in OUT_OF_DOMAIN.items()
    ]


def declare(name: str, stem: str, evaluated_on: str) -> Task:
    """One set as a task; only in-domain sets train."""
    sizes = dict(TABLE_11[name])
    sizes["test"] = sizes["validation"]
    train = {"train": SplitRule(("train",))} if name in IN_DOMAIN else {}
    return Task(
        name=name,
        kind="qa",
        splits=train | {split: SplitRule((evaluated_on,)) for split in ("validation", "test")},
        source=TEMPLATE,
        target="",
        metrics=("em", "f1"),
        decoding=Decoding(max_target_length=MAX_ANSWER_TOKENS),
        repo=REPO,
        configs=("plain_text", "default", "data", ""),
        reader="hdscale.data.tasks.mrqa.read",
        options={"set": stem},
        sizes=sizes,
    )


def paths_of(task: Task, origin: str, settings: DataSettings) -> list[Path]:
    """The files of one of the set's splits: the shared task's own, else the hub's form (mirrored or fetched).

    Raises:
        UserError: the file is missing.
    """
    if task.files:
        return [Path(path).expanduser() for path in task.files[origin]]
    folder = None
    if settings.mrqa_root is not None:
        folder = Path(settings.mrqa_root)
    elif settings.root is not None and (Path(settings.root) / "mrqa").is_dir():
        folder = Path(settings.root) / "mrqa"
    if folder is None:
        return hub.split_paths(task, origin, settings)
    stem = folder / FOLDERS[origin] / task.options["set"]
    for path in (Path(f"{stem}.jsonl.gz"), Path(f"{stem}.jsonl")):
        if path.is_file():
            return [path]
    raise UserError(
        f"{stem}.jsonl.gz is missing: split '{origin}' of task {task.name}; take it from the shared task's "
        "page, or name other tasks"
    )


def identity(task: Task, split: str, settings: DataSettings) -> list[str]:
    """Checksums of the split's files, and how contexts are cut."""
    paths = split_paths(task, split, settings)
    return [f"overlap {settings.chunk_overlap}", *(file_checksum(path, settings) for path in paths)]


def check(task: Task, split: str, settings: DataSettings) -> None:
    """Raise UserError if a file of the split is not there or does not begin as it should."""
    for path in split_paths(task, split, settings):
        if path.suffix == ".parquet":
            known = open_parquet(path).schema_arrow.names
            for column in ("subset", "context", "qid", "question", "answers", "detected_answers"):
                if column not in known:
                    raise UserError(f"{path}: no column '{column}', which task {task.name} reads")
        else:
            next(passages(path), None)


def size(task: Task, split: str, settings: DataSettings) -> int:
    """Questions of the split, as Table 11 counts them (before chunking)."""
    return sum(1 for _ in questions(task, split, settings))


def examples(task: Task, split: str, settings: DataSettings, tokenizer: Any = None) -> Iterator[Example]:
    """The chunks of the split's questions (Section 3.1.2), or whole questions where there is no tokenizer to
    cut by.

    Chunks are `hdscale.data.tasks.mrqa.chunks.Chunk`s: their `group` is the question's id, their `input_ids` the
    exact window.
    """
    found = questions(task, split, settings)
    if tokenizer is None:
        return found
    return chunks_of_questions(
        found, tokenizer, settings.max_source_length, settings.chunk_overlap, training=split == "train"
    )


def questions(task: Task, split: str, settings: DataSettings, limit: int | None = None) -> Iterator[Question]:
    """The split's questions in the order of its files, repeats left out.

    Raises:
        UserError: naming file, line (or row) and field of the first thing that cannot be used.
    """
    seen: dict[str, list[int]] = {}
    keep = None
    if task.splits[split].part != "all":
        chosen = task.splits[split].select(sum(1 for _ in read_paths(task, split, settings)))
        keep = None if chosen is None else set(chosen.tolist())
    found = (
        question
        for number, (where, context, qa) in enumerate(read_paths(task, split, settings))
        if keep is None or number in keep
        for question in [make_question(task, where, context, qa, seen)]
        if question is not None
    )
    return islice(found, limit)


def split_paths(task: Task, split: str, settings: DataSettings) -> list[Path]:
    """All files of a split."""
    return [path for origin in task.splits[split].origins for path in paths_of(task, origin, settings)]


def read_paths(task: Task, split: str, settings: DataSettings) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file and line, context, question record) of every question of a split."""
    for path in split_paths(task, split, settings):
        if path.suffix == ".parquet":
            yield from hub_rows(path, task.options.get("set"))
        else:
            for where, context, qas in passages(path):
                for number, qa in enumerate(qas):
                    yield f"{where}: qas[{number}]", context, qa


def passages(path: Path) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """(file and line, context, question records) of each line of the shared task's file, header left out."""
    if not path.is_file():
        raise UserError(f"no file {path}; relative paths start at the working folder")
    rows = json_rows(path)
    number = 0
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except zlib.error as error:
            raise UserError(f"{path}: damaged after line {number} ({error}); copy it again") from error
        where = f"{path}: line {number}"
        if "header" in row and "context" not in row:
            header = row["header"]
            if not isinstance(header, Mapping) or "dataset" not in header:
                raise UserError(f"{where}: field 'header.dataset' is missing; name the data set or leave the line out")
            continue
        context = field_of(row, "context", str, where)
        qas = field_of(row, "qas", list, where)
        yield where, clean(context), qas


def hub_rows(path: Path, subset: str | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(file and row, context, question record) of the rows of one subset of the hub's parquet file."""
    columns = ["subset", "context", "qid", "question", "answers", "detected_answers"]
    number = -1
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if subset is None or row["subset"] == subset:
                    record = {**row, "detected_answers": hub_answers(row["detected_answers"])}
                    yield f"{path}: row {number}", clean(row["context"] or ""), record


def hub_answers(found: Any) -> list[dict[str, Any]]:
    """Detected answers in the shared task's form, from the hub's (lists inside mappings, or mappings inside
    lists).
    """
    if found is None:
        return []
    if isinstance(found, Mapping):
        texts, places = found.get("text") or [], found.get("char_spans") or []
        found = [{"text": text, "char_spans": spans} for text, spans in zip(texts, places, strict=True)]
    answers = []
    for answer in found:
        spans = answer["char_spans"]
        if isinstance(spans, Mapping):
            pairs = list(zip(spans["start"], spans["end"], strict=True))
        else:
            pairs = [(span["start"], span["end"]) if isinstance(span, Mapping) else tuple(span) for span in spans]
        answers.append({"text": answer["text"], "char_spans": [list(pair) for pair in pairs]})
    return answers


def make_question(task: Task, where: str, context: str, record: Any, seen: dict[str, list[int]]) -> Question | None:
    """A question from its record, or None if it repeats an earlier one; `seen` is {qid: hashes of question
    and context}.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where} must be an object with 'qid', 'question' and 'answers'")
    qid = field_of(record, "qid", str, where)
    text = clean(field_of(record, "question", str, where)).strip()
    content = hash((text, context))
    earlier = seen.setdefault(qid, [])
    if content in earlier:
        return None
    earlier.append(content)
    detected = record.get("detected_answers")
    spans = read_spans(detected if detected is not None else [], context, where)
    answers = record.get("answers")
    if answers is None and detected is not None:
        answers = [answer["text"] for answer in detected if "text" in answer]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: field 'answers' is missing or no list of texts")
    return Question(
        source=prompt_before_context(task.source, text) + context,
        target=context[spans[0][0] : spans[0][1] + 1] if spans else "",
        task=task.name,
        id=qid if len(earlier) == 1 else f"{qid}~{len(earlier)}",
        references=tuple(map(clean, answers)) or ("",),
        qid=qid,
        question=text,
        begin=task.source.index("{question}"),
        context=context,
        spans=spans,
    )


def prompt_before_context(template: str, question: str) -> str:
    """The prompt up to the context; the template must end with it, so that chunks differ at their ends."""
    before, marker, after = template.partition("{context}")
    if not marker or after or "{question}" not in before:
        raise UserError(f"template '{template}': a chunked QA task needs '{{question}}' and, at its end, '{{context}}'")
    return before.replace("{question}", question)


def read_spans(detected: Any, context: str, where: str) -> tuple[tuple[int, int], ...]:
    """(first, last) of every detected answer, checked against the context and stripped of white space."""
    if not isinstance(detected, list):
        raise UserError(f"{where}: field 'detected_answers' must be a list")
    spans = []
    for number, answer in enumerate(detected):
        field = f"detected_answers[{number}]"
        if not isinstance(answer, Mapping) or not isinstance(answer.get("char_spans"), list):
            raise UserError(f"{where}: field '{field}.char_spans' is missing or no list")
        for index, span in enumerate(answer["char_spans"]):
            if not (isinstance(span, list | tuple) and len(span) == 2 and all(type(end) is int for end in span)):
                raise UserError(f"{where}: field '{field}.char_spans[{index}]' must be [first, last], not {span!r}")
            first, last = span
            if not 0 <= first <= last < len(context):
                raise UserError(
                    f"{where}: field '{field}.char_spans[{index}]' is [{first}, {last}], outside the context "
                    f"of {len(context)} characters (ends are inclusive)"
                )
            while first <= last and context[first].isspace():
                first += 1
            while last > first and context[last].isspace():
                last -= 1
            if first <= last:
                spans.append((first, last))
    return tuple(spans)


def field_of(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A required field of a JSON object."""
    if name not in record:
        raise UserError(f"{where}: field '{name}' is missing")
    if not isinstance(record[name], kind):
        raise UserError(f"{where}: field '{name}' must be a {kind.__name__}, not {type(record[name]).__name__}")
    return record[name]


def clean(text: str) -> str:
    """The text with lone surrogates replaced, character for character."""
    return _SURROGATE.sub("\ufffd", text)


def official_ids(question_ids: Iterable[str]) -> dict[str, str]:
    """{question id: qid as the file has it}: without the number that a repeated qid got."""
    ids = list(question_ids)
    known = set(ids)
    found = {}
    for question_id in ids:
        stem, mark, number = question_id.rpartition("~")
        repeated = bool(mark) and number.isdigit() and stem in known
        found[question_id] = stem if repeated else question_id
    return found
