"""Every rank looks at itself, then at the others, and tells all what it found."""

from __future__ import annotations

import datetime
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  # documented

from launch import links, probes
from launch.findings import Facts
from launch.inputs import Run
from launch.meeting import choose_device, exchange, join
from launch.ranks import Ranks
from launch.supervision import error_line


class Survey:
    """The facts of all ranks, the same on all.

    Args:
        store: Of all ranks.
        ranks: Of this process.
        timeout_s: Until nobody waits longer for what a rank has to tell.
    """

    def __init__(self, store: Store, ranks: Ranks, timeout_s: float) -> None:
        self.store, self.ranks, self.timeout_s = store, ranks, timeout_s
        world = range(ranks.world_size)
        self.facts: list[Facts] = [
            {"rank": rank, "host": "?", "errors": {}, "answers": "in time"} for rank in world
        ]

    def tell(self, part: str, found: Facts) -> None:
        """Add what this rank found in a part of the survey, and what the others did (all ranks).

        Raises:
            TimeoutError: A rank did not tell in time; the same on all.
        """
        told = exchange(self.store, self.ranks, part, found, self.timeout_s)  # all ranks
        for fact, more in zip(self.facts, told, strict=True):
            if more is None:
                what = f"no answer about {part} within {self.timeout_s:.0f} s"
                more = {"errors": {"answers": f"{what}. Fix: look at what hangs there"}}
            errors = fact["errors"] | more.pop("errors", {})
            fact |= more | {"errors": errors}
        if None in told:
            raise TimeoutError(part)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each machine."""
        return links.nodes_of([fact["host"] for fact in self.facts])

    def failed(self, *checks: str) -> bool:
        """Return whether a rank could not do one of these."""
        return any(check in fact["errors"] for fact in self.facts for check in checks)


def survey_all(run: Run, survey: Survey) -> None:
    """Fill in the facts (all ranks); what would hang after what was found is left out.

    Raises:
        TimeoutError: A rank did not tell in time.
    """
    token = {"token": secrets.token_hex(8)}  # rank 0's counts
    survey.tell("host names", {"host": socket.gethostname()} | token)
    survey.tell("clocks", {"clock": time.time()})  # all were let go at the same moment
    look_around(run, survey)
    kinds = {fact["device"]["kind"] for fact in survey.facts if "device" in fact}
    if survey.failed("device") or len(kinds) > 1 or any(fact["reach"] for fact in survey.facts):
        return
    device = choose_device(run.ranks)
    multiply_in_turn(survey, device)
    if not survey.failed("memory", "matmul"):
        add_up_in_pairs(survey, device)


def look_around(run: Run, survey: Survey) -> None:
    """Look at this machine, the folders and the network (all ranks)."""
    run_dir, token = run.config.run_dir, survey.facts[0]["token"]
    with links.listening() as address:
        seen = probes.look(run) | {"address": address}
        if run.ranks.is_main:
            links.leave_token(run_dir, token)
        survey.tell("machines and folders", seen)
        found: Facts = {"reach": links.unreached([fact["address"] for fact in survey.facts])}
        if "run folder" in survey.facts[0]:  # rank 0 could write
            found["run folder shared"] = links.find_token(run_dir, token)
        survey.tell("connections", found)
    if run.ranks.is_main:
        links.remove_token(run_dir)


def multiply_in_turn(survey: Survey, device: torch.device) -> None:
    """Measure memory and speed of one rank of each machine after the other (all ranks)."""
    survey.tell("memory", attempt("memory", probes.read_memory, device))
    for turn in range(max(map(len, survey.nodes))):
        is_mine = any(node[turn : turn + 1] == [survey.ranks.rank] for node in survey.nodes)
        found = attempt("matmul", probes.measure_matmul, device) if is_mine else {}
        survey.tell(f"matmul {turn}", found)


def add_up_in_pairs(survey: Survey, device: torch.device) -> None:
    """Measure all-reduces, up to the first that fails (all ranks)."""
    timeout = datetime.timedelta(seconds=links.COLLECTIVE_S)
    ranks, nodes = survey.ranks, survey.nodes
    found = attempt("process group", join, survey.store, ranks, device, timeout)
    survey.tell("process group", found)
    if survey.failed("process group"):
        return
    rounds = [("pairs in a machine", pairs) for pairs in links.rounds_inside(nodes)]
    rounds += [("pairs of machines", pairs) for pairs in links.rounds_across(nodes)]
    rounds += [("all ranks", [list(range(ranks.world_size))])]
    for number, (check, groups) in enumerate(rounds):
        found: Facts = {}
        for group in groups:
            if ranks.rank in group:
                found = attempt(check, links.add_up, group, device)
        before = survey.facts[ranks.rank].get(check)
        if before and check in found:
            found[check] = links.better(found[check], before)
        survey.tell(f"{check} {number}", found)
        if survey.failed(check):
            return


def attempt(check: str, work: Callable[..., Any], *args: Any) -> Facts:
    """Return what a measurement gives, as a fact of this rank, or why it fails."""
    try:
        return {check: work(*args)}
    except (RuntimeError, OSError) as error:
        return {"errors": {check: error_line(error)}}
