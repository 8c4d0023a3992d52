"""`hdscale launch`: submit a run or a sweep by submitit, on SLURM or on this machine; status, logs, cancel.

hdscale launch --config configs/glue_xl.yaml cluster.nodes=4 cluster.partition=gpu
hdscale launch --config configs/glue_base.yaml --sweep method.decoder.dim=32,64 run.seed=1..5
hdscale launch --status glue_base      # --logs, --cancel
"""

from __future__ import annotations

import argparse

from hdscale.cluster.checks import check_slurm, has_slurm
from hdscale.cluster.status import cancel, show_launches, show_logs, show_status
from hdscale.commands.arguments import add_config_arguments
from hdscale.errors import UserError
from hdscale.launch import check_runs, plan_runs, submit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--sweep", nargs="+", metavar="key=a,b", default=[], help="one job array over all combinations")
    parser.add_argument("--dry-run", action="store_true", help="check, print the sbatch script, submit nothing")
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run of this name is moved aside")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--status", nargs="?", const="", metavar="NAME", help="state of a launch (no NAME: list them)")
    which.add_argument("--logs", metavar="NAME", help="last lines of each run's log")
    which.add_argument("--cancel", metavar="NAME", help="cancel what is queued or running")
    parser.add_argument("--lines", type=int, default=20, help="number of lines that --logs shows per run (default: 20)")
    parser.add_argument("--dir", default="runs", help="run.dir of the launches for --status, --logs and --cancel")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.status is not None:
        return show_status(args.dir, args.status) if args.status else show_launches(args.dir)
    if args.logs:
        return show_logs(args.dir, args.logs, args.lines)
    if args.cancel:
        return cancel(args.dir, args.cancel)
    if not args.config:
        raise UserError("nothing to launch: name a configuration with --config FILE, or --status NAME")
    config, runs = plan_runs(args.config, args.overrides, args.sweep)
    config.cluster.check_executor()
    if config.cluster.executor == "slurm" and (has_slurm() or not args.dry_run):
        check_slurm(config.cluster)
    check_runs([one for one, _ in runs])
    return submit(config, runs, args.fresh, args.dry_run)
