"""The examination of several nodes: each part by all processes together, and what follows from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from hdscale.doctor.nodes.clocks import clock_faults, clock_offsets
from hdscale.doctor.nodes.facts import GIB, Facts, differences, gpu_faults, node_name, nodes_of, own_facts
from hdscale.doctor.nodes.network import Speed, measure, slow_nodes
from hdscale.doctor.nodes.report import Report, about_clocks, about_folder, about_network, about_nodes
from hdscale.doctor.nodes.shared_folder import PATIENCE, Folder, Probe, folder_faults
from hdscale.engine.ranks import Ranks, choose_device

ALL_NODES = "all nodes"
CACHE_FOLDER, RUN_FOLDER = "cache folder", "run folder"
SHARE_OF_MEMORY = 0.125
"""Of what is free, for one tensor of an all-reduce."""

Limit = Callable[[float, str], AbstractContextManager[None]]
"""`with limit(seconds, what):` ends the command if its block takes longer: a network or a disk may never answer."""


@dataclass(frozen=True)
class Place:
    """This process's node, as the examination sees it (tests give other values than the machine's).

    Attributes:
        name: of the node. clock: gives the time. patience: seconds to wait for another node's file.
    """

    name: str
    clock: Callable[[], float] = time.time
    patience: float = PATIENCE

    @classmethod
    def here(cls) -> Place:
        """The real one."""
        return cls(node_name(os.environ))


def examine(
    ranks: Ranks,
    folders: dict[str, Path],
    say: Callable[[Sequence[str]], None],
    limit: Limit,
    place: Place | None = None,
    facts: Facts | None = None,
) -> Report:
    """Examine the nodes of all processes, which must have met on their CPUs; every process gets the report.

    Args:
        ranks: with device "cpu", so that a node whose GPUs do not work is found rather than waited for.
        folders: `RUN_FOLDER`, and `CACHE_FOLDER`, which may be each node's own.
        say: told the lines of each part on rank 0, as soon as they are known.
        limit: see `Limit`.
        place, facts: of this process; default: the real ones.
    """
    place = place or Place.here()
    with limit(120, "gathering what each process knows of its node"):
        everyone = ranks.gather_objects(facts or own_facts(ranks.launch, place.name))
    report = Report(everyone, problems=[*differences(everyone), *gpu_faults(everyone)])
    say(about_nodes(everyone))

    names = {processes[0].rank: node for node, processes in nodes_of(everyone).items()}
    leaders = list(names)
    with limit(60, "comparing the clocks"):
        offsets = ranks.broadcast_object(clock_offsets(ranks.rank, leaders, place.clock))
    report.clocks = {names[rank]: values for rank, values in offsets.items()}
    report.problems += clock_faults(names, offsets)
    say(about_clocks(report.clocks))

    for title, path in folders.items():
        with limit(180, f"checking the {title} {path}"):
            folder = Probe(ranks, leaders, path, place.patience).check(title, list(names.values()))
        report.folders.append(folder)
        say(about_folder(folder))
        judge_folder(report, folder, names[leaders[0]])

    with limit(
        420, "measuring all-reduce (NCCL_DEBUG=INFO says what NCCL does; cluster.interface chooses the network)"
    ):
        measure_network(ranks, report)
    say(about_network(report.backend, [*report.within, *([report.across] if report.across else [])]))
    return ranks.broadcast_object(report)


def judge_folder(report: Report, folder: Folder, first: str) -> None:
    """Take over what is wrong with a folder. A cache may be each node's own."""
    faults = folder_faults(folder, first)
    if folder.title == CACHE_FOLDER and folder.blind and not folder.fault:
        own = f"the {folder.title} {folder.path} is each node's own: each node tokenises and builds kernels for itself"
        report.notes.append(own)
        faults = [fault for fault in faults if "does not see" not in fault]
    report.problems += faults
    if folder.without_locks:
        report.notes.append(
            f"locks in the {folder.title} {folder.path} do not keep out {', '.join(folder.without_locks)}"
        )


def measure_network(ranks: Ranks, report: Report) -> None:
    """All-reduce within each node at the same time, then across all nodes."""
    mine = report.facts[ranks.rank]
    nodes = nodes_of(report.facts)
    on_gpus = all(one.gpu for one in report.facts) and not any("share one GPU" in line for line in report.problems)
    device = torch.device("cpu")
    if on_gpus:
        device = choose_device("cuda", mine.local_rank)
        torch.cuda.set_device(device)
    report.backend = "nccl" if on_gpus else "gloo"
    free = min(one.gpu_free if on_gpus else one.memory / len(nodes[one.node]) for one in report.facts)
    most_bytes = SHARE_OF_MEMORY * free * GIB

    within = {node: [one.rank for one in processes] for node, processes in nodes.items()}
    found = ranks.gather_objects(measure(within, ranks.rank, device, most_bytes))
    report.within = [speed for speed in (found[members[0]] for members in within.values()) if speed]
    take_faults(report, found, "within the node")
    if on_gpus:
        report.problems += slow_nodes(report.within)
    if len(nodes) > 1:
        across = {ALL_NODES: list(range(ranks.world_size))}
        found = ranks.gather_objects(measure(across, ranks.rank, device, most_bytes))
        report.across = found[0]
        take_faults(report, found, "across nodes")


def take_faults(report: Report, found: Sequence[Speed | None], where: str) -> None:
    """Take over what has failed, once for each node."""
    for one, speed in zip(report.facts, found, strict=True):
        problem = f"{one.node}: all-reduce {where}: {speed.fault}" if speed and speed.fault else ""
        if problem and problem not in report.problems:
            report.problems.append(problem)
