"""What a run reports while it runs: metrics.jsonl, train.log, a progress bar or plain lines, TensorBoard, W&B."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hdscale.errors import UserError
from hdscale.files import write_text
from hdscale.runs.folder import LOG, METRICS
from hdscale.runs.settings import RunSettings
from hdscale.settings import flatten

EVALUATION_NEWS_SECONDS = 30.0
"""Without a terminal for a bar, a long evaluation logs its progress this often (seconds)."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One optimizer step over a global batch.

    Attributes:
        step: number of this step, counted from 1.
        loss: mean over the global batch's target tokens (or their sum, with `train.loss_reduction=sum`).
        target_tokens: of the global batch.
        grad_norm: norm of the global gradient before clipping.
        learning_rate: the (first parameter group's) rate of this step.
    """

    step: int
    loss: float
    target_tokens: int
    grad_norm: float
    learning_rate: float


class SteadyConsole(Console):
    """A console that stays silent once its reader is gone: the launcher may die, and its terminal with it."""

    def on_broken_pipe(self) -> None:
        """Instead of rich's way, which ends the program: a run must live to save its checkpoint."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class RunLog:
    """The log of a run. Every rank has one; only rank 0's writes.

    `metrics.jsonl` has one flat dict per line: `kind` "train" (every `train.log_every` steps) or "evaluation", `step`,
    and numbers. On resume, lines after the checkpoint's step are removed, so that it reads like an uninterrupted run's.

    Args:
        folder: the run's folder.
        run: `run.*`. log_every: `train.log_every`.
        active: whether this rank writes.
        memory: gives the GB (10^9 bytes) of memory in use.
        config: the resolved configuration, for W&B.

    Raises:
        UserError: on every rank, if TensorBoard or W&B is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        run: RunSettings,
        log_every: int,
        *,
        active: bool,
        memory: Callable[[], float],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._run, self._log_every, self._config = Path(folder), run, log_every, config or {}
        self._active, self._memory = active, memory
        self._console = SteadyConsole(soft_wrap=True)
        self._files: dict[str, Any] = {}
        self._logged: set[tuple[str, int, str]] = set()
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._max_steps = 0
        self._window: tuple[int, float, int, int, float] | None = None
        self._writers: list[Callable[[Mapping[str, Any]], None]] = []
        self._closers: list[Callable[[], None]] = []
        for wanted, package, key in (
            (run.tensorboard, "tensorboard", "run.tensorboard=true"),
            (run.wandb, "wandb", f"run.wandb={run.wandb}"),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"{key} needs the package {package}: pip install {package}, or leave it out")
        if self._active:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files[LOG] = (self._folder / LOG).open("a", encoding="utf-8")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._write(LOG, stamped(f"{kind.__name__ if kind else ''}: {error}"))
        self.close()

    @property
    def active(self) -> bool:
        """Whether this rank writes the log."""
        return self._active

    def info(self, text: str) -> None:
        """A line for the console and train.log."""
        if self._active:
            self._write(LOG, stamped(text))
            self._say(text)

    def warning(self, text: str) -> None:
        """A line that stands out."""
        self.info(f"warning: {text}")

    def start(self, step: int, max_steps: int) -> None:
        """Begin or resume at `step` (steps done): removes later lines of metrics.jsonl and opens the bar."""
        if not self._active:
            return
        self._max_steps = max_steps
        self._logged = cut_back(self._folder / METRICS, step)
        self._files[METRICS] = (self._folder / METRICS).open("a", encoding="utf-8")
        if self._run.tensorboard:
            self._open_tensorboard(step)
        if self._run.wandb:
            self._open_wandb()
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[news]}"),
                console=self._console,
            )
            self._bars.start()
            self._bar = self._bars.add_task("train", total=max_steps, completed=step, news="")

    def step(
        self,
        result: StepResult,
        *,
        samples: int,
        tokens: int,
        seconds: float,
        waited: float = 0.0,
        padding: float = 0.0,
    ) -> None:
        """A training step is done.

        Args:
            samples, tokens, seconds: of training so far, over all sessions of the run (evaluation not counted).
            waited: seconds of this session in which training waited for data.
            padding: share of padding among the tokens that this rank computed in this step.
        """
        if not self._active:
            return
        if self._window is None:
            # the first step of a session is warm-up: rates are measured from its end
            self._window = (result.step, seconds, samples, tokens, waited)
        due = result.step % self._log_every == 0 or result.step in (1, self._max_steps)
        if not due and self._bars is None:
            return
        since_step, since_seconds, since_samples, since_tokens, since_waited = self._window
        elapsed = seconds - since_seconds
        rates = {
            "samples_per_second": (samples - since_samples) / elapsed if elapsed > 0 else None,
            "tokens_per_second": (tokens - since_tokens) / elapsed if elapsed > 0 else None,
        }
        memory = self._memory()
        news = f"loss {result.loss:.4f}"
        if rates["samples_per_second"] is not None:
            news += f"  {rates['samples_per_second']:.1f} samples/s  {rates['tokens_per_second']:.0f} tokens/s"
        news += f"  {memory:.2f} GB"
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=result.step, news=news)
        if not due:
            return
        per_step = elapsed / (result.step - since_step) if result.step > since_step else 0.0
        if per_step:
            news += f"  ETA {duration(per_step * (self._max_steps - result.step))}"
        line = {
            "kind": "train",
            **dataclasses.asdict(result),
            "samples": samples,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            **{name: None if rate is None else round(rate, 3) for name, rate in rates.items()},
            "data_wait": round((waited - since_waited) / elapsed, 4) if elapsed > 0 else None,
            "padding": round(padding, 4),
            "memory_gb": round(memory, 4),
        }
        self._metrics(line, "")
        text = f"step {result.step}/{self._max_steps}  {news}"
        self._write(LOG, stamped(text))
        if self._bars is None:
            self._say(text)
        self._window = (result.step, seconds, samples, tokens, waited)

    def evaluating(self, split: str) -> Callable[[str, int, int], None]:
        """A callback `(task name, rows done, rows)` that shows how far an evaluation is."""
        bars: dict[str, TaskID] = {}
        last = time.monotonic()

        def show(task: str, done: int, total: int) -> None:
            nonlocal last
            if not self._active:
                return
            if self._bars is not None:
                if task not in bars:
                    bars[task] = self._bars.add_task(f"{split} {task}", total=total, news="")
                self._bars.update(bars[task], completed=done)
                if done >= total:
                    self._bars.remove_task(bars.pop(task))
            elif time.monotonic() - last > EVALUATION_NEWS_SECONDS:
                last = time.monotonic()
                self._say(f"{split} {task}: {done}/{total}")

        return show

    def evaluation(
        self,
        step: int,
        split: str,
        metrics: Mapping[str, Mapping[str, float]],
        averages: Mapping[str, float],
        selection: float | None = None,
    ) -> None:
        """An evaluation is done: {task: {metric: value}}, the averages over tasks, and the score that selects."""
        if not self._active:
            return
        scores = {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}
        self._metrics(
            {"kind": "evaluation", "step": step, "split": split, **averages, "selection": selection, **scores}, split
        )
        summary = "  ".join(
            f"{task} {' / '.join(f'{v:.2f}' for v in values.values())}" for task, values in metrics.items()
        )
        shown = f"average {averages['average']:.2f}  " if "average" in averages else ""
        self.info(f"step {step}  {split}: {shown}{summary}")

    def close(self) -> None:
        """End the bar and close the files. What was logged is on disk."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        for closer in self._closers:
            closer()
        self._closers, self._writers = [], []
        for file in self._files.values():
            file.close()
        self._files = {}

    def _metrics(self, line: Mapping[str, Any], split: str) -> None:
        key = (str(line["kind"]), int(line["step"]), split)
        if key in self._logged:
            # done again after a resume (a final test, say): the same numbers, already there
            return
        self._logged.add(key)
        self._write(METRICS, json.dumps(line))
        for writer in self._writers:
            writer(line)

    def _write(self, name: str, text: str) -> None:
        """A line to a file. A full disk must not stop one rank alone: the next checkpoint will stop them all."""
        file = self._files.get(name)
        if file is None:
            return
        try:
            file.write(text + "\n")
            file.flush()
        except OSError as error:
            self._files.pop(name)
            self._say(f"warning: {self._folder / name} cannot be written ({error.strerror}); continuing without it")

    def _say(self, text: str) -> None:
        """A line to the console, if there still is one."""
        try:
            self._console.print(text, markup=False, highlight=False)
        except OSError:
            self._console.on_broken_pipe()

    def _open_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was written after the checkpoint that this session starts from
        board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)

        def write(line: Mapping[str, Any]) -> None:
            for name, value in numbers(line):
                board.add_scalar(f"{line.get('split', line['kind'])}/{name}", value, line["step"])

        self._writers.append(write)
        self._closers.append(board.close)

    def _open_wandb(self) -> None:
        import wandb

        run = wandb.init(
            project=self._run.wandb,
            name=self._run.name,
            # the same run after a resume
            id=wandb_id(self._folder),
            resume="allow",
            dir=str(self._folder),
            config=flatten(dict(self._config)),
        )

        def write(line: Mapping[str, Any]) -> None:
            prefix = line.get("split", line["kind"])
            run.log({"step": line["step"], **{f"{prefix}/{name}": value for name, value in numbers(line)}})

        self._writers.append(write)
        self._closers.append(run.finish)


def wandb_id(folder: Path) -> str:
    """An id that stays with the run's folder, so that a resumed run continues the same W&B run."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(os.urandom(6).hex())
    return file.read_text().strip()


def numbers(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numeric entries of a metrics line."""
    return [(name, value) for name, value in line.items() if isinstance(value, int | float) and name != "step"]


def cut_back(path: Path, step: int) -> set[tuple[str, int, str]]:
    """Remove from metrics.jsonl what comes after `step`; {(kind, step, split)} of the lines that stay."""
    if not path.exists():
        return set()
    kept, keys = [], set()
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            key = (str(line["kind"]), int(line["step"]), str(line.get("split", "")))
        except (ValueError, KeyError, TypeError):
            continue
        if key[1] <= step and key not in keys:
            kept.append(text)
            keys.add(key)
    write_text(path, "".join(f"{text}\n" for text in kept))
    return keys


def duration(seconds: float) -> str:
    """Such as 2:05:09."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def stamped(text: str) -> str:
    """With the local date and time before it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
