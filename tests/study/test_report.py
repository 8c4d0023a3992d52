"""The report: its numbers, its page in a real browser, what it says where data are thin."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hdscale.errors import UserError
from hdscale.report.palette import COLOURS
from hdscale.study.report import write_report
from hdscale.study.rows import moved_keys, pareto, read_rows, seed_axes
from hdscale.study.spec import load_study
from hdscale.study.store import Store
from tests.helpers.study_files import finish, finished_study, write_study


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.images += [values["src"]] if tag == "img" else []
        self.links += [values["href"]] if tag == "a" else []
        assert tag not in ("script", "link", "iframe"), "the page must be self-contained"

    def handle_data(self, data):
        self.words += data + " "


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(study, store, page) of a finished study; tests only read it."""
    study, store = finished_study(tmp_path_factory.mktemp("finished"))
    return study, store, write_report(store)


def test_the_page_holds_its_pictures_and_its_links_lead_somewhere(reported):
    study, _, page_file = reported
    page = Page(page_file.read_text())
    assert len(page.images) >= 6
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "http" not in "".join(page.links)
    for link in page.links:
        assert (page_file.parent / link).exists(), link
    for run in study.runs:
        assert run.name in page.words
        assert f"../{run.name}/config.yaml" in page.links
    assert not [name for name in os.listdir(page_file.parent) if name.startswith(".")]


def test_fits_find_the_planted_exponent_and_mark_extrapolation(reported):
    words = Page(reported[2].read_text()).words
    exponents = re.findall(r"L = [\d.]+ \(N / 1\.1\de\+06\)\^-(0\.\d+)", words)
    assert len(exponents) == 2  # one per method
    assert all(abs(float(value) - 0.2) < 0.03 for value in exponents)
    assert "beyond 4.3e+06 it is extrapolation" in words and "95% bootstrap" in words


def test_the_numbers_are_the_runs_own(reported):
    study, store, page_file = reported
    with (page_file.parent / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [run.name for run in study.runs]
    first = json.loads((store.run_folder(study.runs[0].name) / "results.json").read_text())
    assert float(lines[0]["average"]) == first["average"]
    assert float(lines[0]["device_hours"]) == pytest.approx(first["seconds"] * 2 / 3600)
    # a device that the plan has figures for brings predictions, and compute counted by the plan's formula
    assert float(lines[0]["planned_samples_per_second"]) > 0 and float(lines[0]["planned_memory_gb"]) > 0
    assert float(lines[-1]["flops"]) > 4 * float(lines[0]["flops"])


def test_two_sizes_are_too_few_for_a_fit_and_the_page_says_so(tmp_path):
    study = load_study(write_study(tmp_path, axes={"size": {"model.name": ["tiny-1", "tiny-2"]}, "run.seed": [1, 2]}))
    store = Store(study.folder)
    store.open(study)
    finish(store, study)
    words = Page(write_report(store).read_text()).words
    assert "no fit (too few sizes to fit: 2 distinct, and A and alpha need at least 3" in words
    assert "Not drawn" in words


def test_an_unfinished_study_is_reported_as_far_as_it_is(tmp_path):
    study, store = finished_study(tmp_path)
    (store.run_folder(study.runs[0].name) / "results.json").unlink()
    store.note(study.runs[0].name, "start", pid=1)
    store.note(study.runs[0].name, "end", code=1, note="out of <memory>")
    text = write_report(store).read_text()
    assert "out of &lt;memory&gt;" in text and "11 done, 1 failed" in text


def test_nothing_to_report(tmp_path):
    study = load_study(write_study(tmp_path))
    store = Store(study.folder)
    with pytest.raises(UserError, match="is not the folder of a study"):
        write_report(store)
    store.open(study)
    with pytest.raises(UserError, match="no run of .* is done yet"):
        write_report(store)


def test_axes_are_told_apart_by_what_they_move(reported):
    _, store, _ = reported
    moved = moved_keys(store.read()["runs"])
    assert moved == {"size": {"model.name"}, "method": {"method.name"}, "run.seed": {"run.seed"}}
    assert seed_axes(moved) == ["run.seed"]


def test_tasks_that_all_runs_share_are_compared(tmp_path):
    axes = {"tasks": {"one": {"data.tasks": ["rte"]}, "two": {"data.tasks": ["rte", "mrpc"]}}}
    study = load_study(write_study(tmp_path, axes=axes, set=None))
    store = Store(study.folder)
    store.open(study)
    finish(store, study)
    for run, tasks in zip(
        study.runs,
        ({"rte": {"accuracy": 60.0}}, {"rte": {"accuracy": 70.0}, "mrpc": {"accuracy": 90.0, "f1": 80.0}}),
        strict=True,
    ):
        path = store.run_folder(run.name) / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": tasks}))
    assert [(row.tasks, row.common_error) for row in read_rows(store)] == [(1, 40.0), (2, 30.0)]


def test_answers_and_summaries_are_compared_by_the_metric_of_the_averages(tmp_path):
    axes = {"tasks": {"one": {"data.tasks": ["squad", "xsum"]}}}
    study = load_study(write_study(tmp_path, axes=axes, set=None))
    store = Store(study.folder)
    store.open(study)
    finish(store, study)
    (run,) = study.runs
    path = store.run_folder(run.name) / "results.json"
    rouge = {"rouge1": 40.0, "rouge2": 20.0, "rougeL": 30.0, "rougeLsum": 30.0}
    tasks = {"squad": {"em": 40.0, "f1": 80.0}, "xsum": rouge}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": tasks}))
    assert [row.common_error for row in read_rows(store)] == [100 - (80 + 20) / 2]


def test_the_report_says_of_each_run_what_its_scores_are_of(tmp_path):
    axes = {"tasks": {"one": {"data.tasks": ["rte"]}, "two": {"data.tasks": ["cola"]}, "old": {"data.tasks": ["mrpc"]}}}
    study = load_study(write_study(tmp_path, axes=axes, set=None))
    store = Store(study.folder)
    store.open(study)
    finish(store, study)
    for run, split in zip(study.runs[:2], ("test", "validation"), strict=True):
        score = {"task": "rte", "split": split, "metrics": {"accuracy": 60.0}, "step": 9, "selection": "best",
                 "rows": 60, "rows_in_split": 277}  # fmt: skip
        path = store.run_folder(run.name) / "results.json"
        tasks = {"tasks": {"rte": {"accuracy": 60.0}} if split == "test" else {}, "validation_average": 60.0}
        path.write_text(json.dumps({**json.loads(path.read_text()), **tasks, "format": 2, "scores": [score]}))
    page = write_report(store).read_text()
    assert "<td>test, step 9 (best), 60 of 277 rows</td>" in page
    assert "<td>validation, step 9 (best), 60 of 277 rows</td>" in page
    assert "<td>split not recorded (hdscale 0.1)</td>" in page
    assert "Not comparable: these runs have validation scores only" in page


def test_pareto_front():
    costs, scores = [1.0, 2.0, 3.0, 3.0, 0.5], [50.0, 40.0, 60.0, 70.0, 50.0]
    assert pareto(costs, scores) == [4, 3]


def test_colours_differ_for_colour_blind_readers():
    """Simulated protanopia and deuteranopia (Viénot 1999, linear RGB): no two of the first six fall together."""
    protan = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
    deutan = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))
    for matrix in (protan, deutan):
        seen = []
        for colour in COLOURS[:6]:
            linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
            seen.append([max(0.0, sum(m * v for m, v in zip(row, linear, strict=True))) ** (1 / 2.2) for row in matrix])
        for one in range(len(seen)):
            for other in range(one):
                distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
                assert distance > 0.1, (COLOURS[one], COLOURS[other], distance)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.landing
@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is not opened in a browser")
def test_a_browser_opens_the_page_from_a_file(reported, tmp_path):
    page = reported[2].resolve()
    common = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    # the document as the browser built it: every picture decoded, nothing wider than the window but the table
    probe = page.with_name("probe.html")
    script = """<script>window.onload = () => {
      const images = [...document.images];
      document.title = JSON.stringify({
        images: images.length,
        decoded: images.filter(i => i.complete && i.naturalWidth > 500).length,
        overflow: document.documentElement.scrollWidth - window.innerWidth,
        rows: document.querySelectorAll('tbody tr').length});
    }</script></body>"""
    probe.write_text(page.read_text().replace("</body>", script))
    done = subprocess.run(
        [*common, "--dump-dom", "--window-size=1200,900", probe.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert found["images"] == found["decoded"] >= 6
    assert found["overflow"] <= 0 and found["rows"] == 12

    shot = tmp_path / "page.png"
    subprocess.run(
        [*common, f"--screenshot={shot}", "--window-size=1100,3000", page.as_uri()], capture_output=True, timeout=120
    )
    assert colours_of(shot) > 50  # text, curves and bands, not an empty page


def colours_of(path: Path) -> int:
    """Different pixel values of a PNG with 8 bits a channel, filters left in: enough to tell a page from nothing."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    place, pixels = 8, b""
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            pixels += data[place + 8 : place + 8 + length]
        place += 12 + length
    raw = zlib.decompress(pixels)
    return len({raw[i : i + 3] for i in range(0, len(raw), 997)})
