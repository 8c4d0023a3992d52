"""`hdscale study FILE`: run a study; `hdscale study report DIR`: make its report.

hdscale study configs/studies/quick.yaml --local 2     on this machine, two runs at a time
hdscale study configs/studies/t5_sizes.yaml            on SLURM, as job arrays
hdscale study configs/studies/quick.yaml --status      how far it is
hdscale study report runs/quick                        the page, its pictures and tables
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.live import Live

from hdscale.errors import EXIT_BROKEN, EXIT_DONE, UserError
from hdscale.study.runner import LocalRunner
from hdscale.study.spec import Study, load_study
from hdscale.study.status import show_status, status_table
from hdscale.study.store import Store
from hdscale.study.submit import check_study, submit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("target", nargs="+", metavar="FILE | report DIR", help="a study's YAML; or report and a folder")
    parser.add_argument("--dir", help="folder of the study (default: dir/name of the file)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--local", type=int, metavar="N", help="run here, N runs at a time, instead of on SLURM")
    how.add_argument("--status", action="store_true", help="show how far every run is; live on a terminal")
    how.add_argument("--dry-run", action="store_true", help="check everything, list the runs, start none")
    parser.add_argument("--extend", action="store_true", help="add the new runs of the file to the study in the folder")
    parser.add_argument("--retry", action="store_true", help="start the runs again that failed too often")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.target[0] == "report":
        if len(args.target) != 2:
            raise UserError("name the folder of one study: hdscale study report runs/quick")
        return report(Store(args.target[1]))
    if len(args.target) != 1:
        raise UserError(f"one study at a time, not {len(args.target)}; or: hdscale study report DIR")
    target = Path(args.target[0])
    if args.status:
        # a folder shows the study that is in it, also where its file has changed or was removed
        return show_status(Store(target if target.is_dir() else load_study(target, args.dir).folder))
    if args.local is not None and args.local < 1:
        raise UserError(f"--local {args.local}: at least one run at a time")
    study = load_study(target, args.dir)
    check_study(study, local=args.local is not None or args.dry_run)
    if args.dry_run:
        for one in study.runs:
            print(one.name)
        print(f"{len(study.runs)} runs in {study.folder}")
        return EXIT_DONE
    store = Store(study.folder)
    store.open(study, args.extend)
    if args.retry:
        store.retry(study)
    if args.local is None:
        return submit(study, store)
    return run_here(study, store, args.local)


def report(store: Store) -> int:
    """Write the report and say where it is."""
    # torch and matplotlib: a study is started, submitted and watched without them
    from hdscale.study.report import write_report

    print(f"wrote {write_report(store)}")
    return EXIT_DONE


def run_here(study: Study, store: Store, parallel: int) -> int:
    """Run on this machine, with a live table on a terminal, elsewhere with a line for each event; then the report."""
    console = Console()
    if console.is_terminal:
        with Live(status_table(store), console=console, refresh_per_second=2) as live:

            def tick() -> None:
                live.update(status_table(store))

            code = LocalRunner(study, store, parallel, say=console.print, tick=tick).run()
    else:
        code = LocalRunner(study, store, parallel, say=lambda text: print(text, flush=True)).run()
    if code in (EXIT_DONE, EXIT_BROKEN) and any(store.results(one.name) for one in study.runs):
        report(store)
    return code
