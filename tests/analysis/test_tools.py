"""analyze compare, tables, embeddings; classify: on runs with known results, and on a tiny model over real text."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from hdscale.analysis.classifier import Pooled, evaluate_classifiers, train_classifiers
from hdscale.analysis.compare import compare_runs, comparison_table
from hdscale.analysis.embeddings import Embedded, colourings, draw, project
from hdscale.analysis.formats import TextTable, escape_latex, render
from hdscale.analysis.options import ClassifierOptions
from hdscale.analysis.tables import tables_of
from hdscale.commands.cli import main
from hdscale.config import Config, to_dict
from hdscale.data.sample import sample_rows
from hdscale.data.tasks import get_task
from hdscale.errors import UserError
from hdscale.runs.results import read_run, task_average
from tests.helpers.places import HUB, T5_TOKENIZER, needs_real_text
from tests.helpers.tiny import save_tiny_t5


def write_run(folder, name, seed, tasks, method="hyperdecoder", **more):
    """A finished run's results."""
    folder.mkdir(parents=True)
    config = {"run": {"seed": seed, "name": name}, "method": {"name": method}}
    tree = {"name": name, "tasks": tasks, "trainable_percent": 2.867, "config": config, **more}
    (folder / "results.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Five seeds of two methods: the first is better on rte by about two points, equal on cola."""
    generator = np.random.default_rng(0)
    found = {}
    for method, gain in (("hyperdecoder", 2.0), ("adapter", 0.0)):
        for seed in range(5):
            base = 70.0 + seed  # what a seed gives to both: the paired test sees through it
            tasks = {
                "rte": {"accuracy": base + gain + generator.normal(0, 0.1)},
                "cola": {"matthews": 50.0 + generator.normal(0, 1.0)},
                "mrpc": {"accuracy": 80.0 + generator.normal(0, 0.5), "f1": 90.0 + generator.normal(0, 0.5)},
            }
            found[method, seed] = write_run(tmp_path / f"{method}{seed}", f"{method}{seed}", seed, tasks, method)
    return found


def test_compare_is_scipys_tests_with_holms_correction(runs):
    ours, theirs = ([read_run(runs[name, seed]) for seed in range(5)] for name in ("hyperdecoder", "adapter"))
    table = comparison_table(list(reversed(ours)), theirs, ["paired-t", "welch"], without=["cola"])
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == [
        "rte accuracy",
        "cola matthews",
        "mrpc accuracy",
        "mrpc f1",
        "average",
        "average without cola",
    ]
    a, b = ([run.tasks["rte"]["accuracy"] for run in part] for part in (ours, theirs))
    paired, welch = stats.ttest_rel(a, b).pvalue, stats.ttest_ind(a, b, equal_var=False).pvalue
    assert paired < 0.001 < 0.05 < welch
    assert rows["rte accuracy"][5:] == [
        f"{paired:.4f}",
        f"{4 * paired:.4f}",
        f"{welch:.4f}",
        f"{float(rows['rte accuracy'][8]):.4f}",
    ]
    assert rows["rte accuracy"][1] == f"{np.mean(a):.1f} ± {np.std(a, ddof=1):.1f}"
    assert "*" not in rows["rte accuracy"][3]  # Welch's test does not see it
    only_paired = comparison_table(ours, theirs, ["paired-t"])
    assert [row[3].endswith("*") for row in only_paired.rows[:4]] == [True, False, False, False]
    assert "Holm" in " ".join(table.notes)
    without = [task_average(run, ["cola"]) for run in ours]
    assert without[0] == pytest.approx(
        (ours[0].tasks["rte"]["accuracy"] + np.mean(list(ours[0].tasks["mrpc"].values()))) / 2
    )


def test_compare_command(runs, capsys, tmp_path):
    ours = [str(runs["hyperdecoder", seed]) for seed in range(5)]
    theirs = [str(runs["adapter", seed]) for seed in range(5)]
    assert main(["analyze", "compare", *ours, "--against", *theirs, "--without", "cola"]) == 0
    assert "average without cola" in capsys.readouterr().out
    # other seeds cannot be paired: Welch's alone, and it says so
    assert main(["analyze", "compare", *ours[:4], "--against", *theirs[1:]]) == 0
    printed = capsys.readouterr().out
    assert (
        "no paired test: it needs equal and distinct seeds" in printed
        and "[1, 2, 3, 4]" in printed
        and "paired t-test" not in printed
    )
    for arguments, message in [
        ([*ours[:4], "--against", *theirs[1:], "--test", "paired-t"], "pairs runs by seed"),
        ([*ours[:1], "--against", *theirs[:1]], "a test needs at least 2"),
        ([str(tmp_path / "none"), "--against", *theirs], "no results.json"),
        ([*ours, "--against", *theirs, "--without", "squad"], "no task 'squad'"),
    ]:
        assert main(["analyze", "compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_tables_put_runs_beside_the_paper(tmp_path, capsys):
    for seed in (1, 2):
        tasks = {"rte": {"accuracy": 80.0 + seed}, "cola": {"matthews": 50.0}}
        name = f"table1_hyperdecoder_seed{seed}"
        write_run(tmp_path / "runs" / name, name, seed, tasks, average=65.0 + seed)
    (tmp_path / "runs" / "table1_hyperdecoder_seed1" / "classifier.json").write_text(
        json.dumps({"encoder_only": 74.5, "encoder_decoder": None})
    )
    assert main(["analyze", "tables", "--runs", str(tmp_path / "runs"), "--format", "csv"]) == 0
    printed = capsys.readouterr().out
    rows = [row for row in csv.reader(printed.splitlines()) if row]
    header = next(row for row in rows if "CoLA" in row)
    own = next(row for row in rows if "here, 2 runs, split not recorded" in row and len(row) == len(header))
    assert own[0].startswith("Hyperdecoder (ours) [")  # the note that a file of 0.1 does not say the split
    found = dict(zip(header, own, strict=True))
    assert (found["RTE"], found["CoLA"], found["Avg"], found["SST-2"]) == (
        "81.5 ± 0.7",
        "50.0 ± 0.0",
        "66.5 ± 0.7",
        "–",
    )
    assert found["trainable"] == "2.87%"
    # the same runs are in Tables 8, 9 and 13 too, and the classifier's in Table 7
    titles = [line for line in printed.splitlines() if line.startswith("# Table")]
    assert [title.split(":")[0] for title in titles] == [
        "# Table 1",
        "# Table 7",
        "# Table 8",
        "# Table 9",
        "# Table 13",
    ]
    assert any(row[1:2] == ["here, 2 runs, split not recorded"] and row[-1] == "74.5" for row in rows)


def test_reported_rows_are_marked(capsys):
    assert main(["analyze", "tables", "--table", "4", "5"]) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "CA-MTL" in line]
    assert "reported by Pilault et al. (2021)" in row and "79.5" in row
    assert "reported by Friedman et al. (2021)" in printed
    assert main(["analyze", "tables", "--table", "12"]) == 2


def test_tables_of_other_runs(tmp_path, capsys):
    write_run(tmp_path / "mine", "mine", 0, {"rte": {"accuracy": 61.25}}, average=61.25)
    assert main(["analyze", "tables", "--runs", str(tmp_path)]) == 2
    assert "--table runs" in capsys.readouterr().err
    out = tmp_path / "tables" / "mine.tex"
    assert (
        main(
            ["analyze", "tables", "--runs", str(tmp_path), "--table", "runs", "--format", "latex", "--output", str(out)]
        )
        == 0
    )
    assert r"mine & split not recorded (hdscale 0.1) & hyperdecoder & 2.87\% & 61.2 & 61.2 \\" in out.read_text()
    (tmp_path / "mine" / "results.json").write_text("{")
    assert main(["analyze", "tables", "--runs", str(tmp_path)]) == 2
    assert "not the results of a run" in capsys.readouterr().err


def test_formats():
    table = TextTable("A & B", ["name", "x|y"], [["a_b", "1.0 ± 0.2"], ["c", "50%"]], ["note *"])
    assert render(table, "markdown").splitlines()[2:5] == [
        r"| name |      x\|y |",
        "| ---- | --------: |",
        "| a_b  | 1.0 ± 0.2 |",
    ]
    assert list(csv.reader(render(table, "csv").splitlines()))[:3] == [
        ["name", "x|y"],
        ["a_b", "1.0 ± 0.2"],
        ["c", "50%"],
    ]
    latex = render(table, "latex")
    assert r"a\_b & 1.0 $\pm$ 0.2 \\" in latex and r"\caption{A \& B. note $^{*}$.}" in latex
    assert escape_latex("~1% {x} \\") == r"\textasciitilde{}1\% \{x\} \textbackslash{}"


def test_projections_and_colours():
    """Three clusters far apart in 16 dimensions stay apart in both projections, the same at each call."""
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 20, (3, 16))
    vectors = np.concatenate([centre + generator.normal(0, 1, (20, 16)) for centre in centres]).astype(np.float32)
    projections = project(vectors)
    for points in projections.values():
        means = np.stack([points[k * 20 : k * 20 + 20].mean(0) for k in range(3)])
        within = max(np.linalg.norm(points[k * 20 : k * 20 + 20] - means[k], axis=1).max() for k in range(3))
        assert min(np.linalg.norm(means[i] - means[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > within
    assert all(np.array_equal(project(vectors)[name], points) for name, points in projections.items())
    # of a task-conditioned model all instances of a task are one point
    assert np.isfinite(project(np.ones((30, 4), dtype=np.float32))["tsne"]).all()


def test_colourings_are_those_of_the_figures():
    instances = [
        Embedded("cola", "1", "label", "0"),
        Embedded("stsb", "2", "number", "3.8"),
        Embedded("newsqa", "3", "qa", ""),
        Embedded("newsqa", "4", "qa", "a dog"),
    ]
    by_task, by_label, by_answer = colourings(instances)
    assert by_task.groups == ["cola", "stsb", "newsqa", "newsqa"]
    assert by_label.groups == ["0", None, None, None]  # Figure 3 leaves STS-B out
    assert by_answer.groups == [None, None, "empty answer", "non-empty answer"]
    figure = draw(np.arange(8.0).reshape(4, 2), by_answer, "pca", "title")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["empty answer (1)", "non-empty answer (1)"]
    assert figure.axes[0].get_xlabel() == "principal component 1"


def test_many_groups_are_gathered():
    instances = [Embedded("t", str(i), "label", f"answer {i % 40}") for i in range(400)]
    figure = draw(np.zeros((400, 2)), colourings(instances)[1], "tsne", "title")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 24 and labels[-1] == "(others) (170)"


def test_classifiers_learn_what_is_linear_in_the_means():
    """Labels that depend on one direction of the mean, another for each task: learned, by each task's own metrics."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for name, labels in (("rte", 2), ("mnli", 3)):
        task = get_task(name)
        means = torch.randn(600, 16, generator=generator)
        direction = torch.randn(16, labels, generator=generator)
        numbers = (means @ direction).argmax(dim=-1)
        examples = [SimpleNamespace(target=task.labels[number], references=None) for number in numbers.tolist()]
        sets.append(Pooled(task, means, numbers, examples))
    options = ClassifierOptions(epochs=15, learning_rate=1e-2, warmup_steps=5, batch_size=64)
    model = train_classifiers(sets, options)
    found = evaluate_classifiers(model, sets)
    assert set(found) == {"rte", "mnli"} and min(metrics["accuracy"] for metrics in found.values()) > 90
    again = train_classifiers(sets, options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """A run's folder over real text: a tiny model with its export, untrained."""
    from hdscale.modeling import build_model
    from hdscale.resolve import resolve_model

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    base = save_tiny_t5(tmp_path_factory.mktemp("base") / "t5")
    config = Config()
    config.model.name, config.model.tokenizer = str(base), str(T5_TOKENIZER)
    config.method.encoder.dim = config.method.decoder.dim = 4
    config.method.hypernet.bottleneck = 4
    config.data.tasks, config.data.root = ["rte", "mrpc", "stsb"], str(HUB)
    config.data.cache = str(folder / "cache")
    config.train.dtype = "fp32"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    build_model(resolve_model(config)).save_pretrained(folder / "adapter")
    return folder, config


@needs_real_text
def test_embeddings_of_a_run(real_run, capsys, tmp_path):
    folder, _ = real_run
    assert main(["analyze", "embeddings", "--run", str(folder), "--limit", "12", "--output", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["coordinates.csv", *(f"{m}_by_{c}.png" for m in ("pca", "tsne") for c in ("label", "task"))]
    with (tmp_path / "coordinates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 36 and {row["task"] for row in rows} == {"rte", "mrpc", "stsb"}
    assert len({(row["pca_x"], row["pca_y"]) for row in rows}) > 30  # each instance has its own embedding
    import matplotlib.image

    assert matplotlib.image.imread(tmp_path / "pca_by_task.png").shape[:2] == (780, 1200)
    for arguments, message in [
        (["--limit", "0"], "--limit=0: must be at least 1"),
        (["--limit", "1", "--tasks", "rte"], "too few to draw"),
    ]:
        assert main(["analyze", "embeddings", "--run", str(folder), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["analyze", "embeddings", "--run", str(tmp_path / "none")]) == 2


@needs_real_text
def test_classify_a_run(real_run, capsys):
    folder, config = real_run
    (folder / "results.json").write_text(
        json.dumps({"validation": {"rte": {"accuracy": 60.0}, "mrpc": {"accuracy": 70.0, "f1": 80.0}}})
    )
    assert main(["classify", "--run", str(folder), "--limit", "40"]) == 0
    results = json.loads((folder / "classifier.json").read_text())
    assert set(results["tasks"]) == {"rte", "mrpc"}  # STS-B has no labels
    assert results["encoder_decoder"] == 67.5
    assert main(["classify", "--run", str(folder), "--epochs", "0"]) == 2
    only_numbers = dataclasses.replace(config)
    assert only_numbers.data.tasks == ["rte", "mrpc", "stsb"]
    assert main(["classify", "--run", str(folder), "data.tasks=[stsb]"]) == 2
    assert "labels to classify" in capsys.readouterr().err


@needs_real_text
def test_the_pooled_encoding_is_the_masked_mean_of_each_row(real_run):
    """Rows are encoded in batches by length, and come back in the split's order."""
    from hdscale.analysis.classifier import pool_split
    from hdscale.data.tokenize import tokenized_split
    from hdscale.load import Choice

    folder, config = real_run
    loaded, task = Choice(run=str(folder)).load(config), get_task("rte")
    pooled = pool_split(loaded, task, "validation", config, limit=7, batch_size=3)
    rows = tokenized_split(task, "validation", loaded.tokenizer, config.data)
    for number, row in enumerate(sample_rows(len(rows), 7)):
        ids = torch.tensor([rows.row(row).input_ids])
        with torch.no_grad():
            alone = loaded.model.encode(ids, torch.ones_like(ids)).hidden.mean(dim=1)[0]
        assert torch.allclose(pooled.means[number], alone, atol=1e-5)
        assert task.labels[int(pooled.labels[number])] == pooled.examples[number].target


def scored(rows: int, split: str = "test") -> list[dict]:
    return [
        {"task": "rte", "split": split, "metrics": {"accuracy": 70.0}, "step": 9, "selection": "best", "rows": rows,
         "rows_in_split": 277}
    ]  # fmt: skip


def test_scores_of_other_rows_are_not_compared(tmp_path):
    more = {"format": 2}
    full = write_run(tmp_path / "full", "full", 1, {}, "hyperdecoder", scores=scored(277), **more)
    sample = write_run(tmp_path / "sample", "sample", 2, {}, "adapter", scores=scored(60), **more)
    with pytest.raises(UserError, match="rte test: 60 of 277 rows in .*sample, 277 in .*full"):
        compare_runs([read_run(full)] * 2, [read_run(sample)] * 2, ["welch"], [])


def test_every_table_says_what_its_scores_are_of(tmp_path: Path) -> None:
    second = {**scored(150)[0], "task": "cola", "metrics": {"matthews": 40.0}}
    tasks = {"rte": {"accuracy": 70.0}, "cola": {"matthews": 40.0}}
    both = write_run(tmp_path / "both", "table1_hyperdecoder", 1, tasks, scores=[*scored(60), second], format=2)
    one = write_run(tmp_path / "one", "one", 2, {"rte": {"accuracy": 70.0}}, scores=scored(277), format=2)
    runs = [read_run(both), read_run(one)]
    of_both = "test, step 9 (best), 60 of 277 rows of rte, 150 of 277 rows of cola"
    (own,) = tables_of(runs, ["runs"])
    assert own.header[1] == "scores of"
    assert [row[1] for row in own.rows] == [of_both, "test, step 9 (best), 277 rows"]
    assert [row[-1].split(" ", 1)[1] for row in own.rows] == ["(2 tasks)", "(1 task)"]
    (paper,) = tables_of(runs, ["1"])
    assert any(row[1] == "here, 1 run, test" for row in paper.rows) and any(of_both in note for note in paper.notes)
    compared = compare_runs([read_run(one)] * 2, [read_run(one)] * 2, ["welch"], [])
    assert sum("test, step 9 (best), 277 rows" in note for note in compared.notes) == 2


def test_other_differences_and_unrecorded_splits_are_named(runs, tmp_path):
    ours = [read_run(runs["hyperdecoder", seed]) for seed in range(5)]
    config = {"method": {"name": "adapter"}, "train": {"max_steps": 9}}
    theirs = [dataclasses.replace(read_run(runs["adapter", seed]), config=config) for seed in range(5)]
    notes = " ".join(compare_runs(ours, theirs, ["welch"], []).notes)
    assert "the runs also differ in train.max_steps: None, 9" in notes
    assert "split not recorded (hdscale 0.1): hyperdecoder0" in notes
