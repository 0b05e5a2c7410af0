"""Every rank looks at itself, then at the others, and tells all what it found."""

from __future__ import annotations

import datetime
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  # documented

from launch.checks import machine, network
from launch.checks.verdicts import Facts, judge
from training import probes
from training.ranks import Ranks
from training.rendezvous import choose_device, exchange, join
from training.run import Run

ATTEMPT_S = 60  # until a measurement is given up
TRIES = 5  # of what is slow: something else may have run there for a moment


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
        return network.nodes_of([fact["host"] for fact in self.facts])

    def suspects(self, check: str) -> set[int]:
        """Return the ranks that a check finds unfit so far."""
        found = next(verdict.findings for verdict in judge(self.facts) if verdict.check == check)
        return {rank for finding in found for rank in finding.ranks}

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
        measure_allreduces(survey, device)


def look_around(run: Run, survey: Survey) -> None:
    """Look at this machine, the folders and the network (all ranks)."""
    run_dir, token = run.config.run_dir, survey.facts[0]["token"]
    with network.listening() as address:
        seen = machine.look(run) | {"address": address}
        if run.ranks.is_main:
            network.leave_token(run_dir, token)
        survey.tell("machines and folders", seen)
        found: Facts = {"reach": network.unreached([fact["address"] for fact in survey.facts])}
        if "run folder" in survey.facts[0]:  # rank 0 could write
            found["run folder shared"] = network.find_token(run_dir, token)
        survey.tell("connections", found)
    if run.ranks.is_main:
        network.remove_token(run_dir)


def multiply_in_turn(survey: Survey, device: torch.device) -> None:
    """Measure memory, and the speed of one rank of each machine after the other (all ranks)."""
    survey.tell("memory", attempt("memory", machine.read_memory, device))
    rank, suspects = survey.ranks.rank, set(range(survey.ranks.world_size))
    for number in range(TRIES):
        nodes = [[r for r in node if r in suspects] for node in survey.nodes]
        for turn in range(max(map(len, nodes))):
            is_mine = any(node[turn : turn + 1] == [rank] for node in nodes)
            found = attempt("matmul", probes.measure_matmul, device) if is_mine else {}
            survey.tell(f"matmul {number} {turn}", keep_better("matmul", found, survey, max))
        suspects = survey.suspects("matmul")
        if not suspects or survey.failed("matmul"):
            return


def measure_allreduces(survey: Survey, device: torch.device) -> None:
    """Measure all-reduces, up to the first that fails (all ranks)."""
    timeout = datetime.timedelta(seconds=probes.ALLREDUCE_TIMEOUT_S)
    ranks, nodes = survey.ranks, survey.nodes
    survey.tell(
        "process group", attempt("process group", join, survey.store, ranks, device, timeout)
    )
    if survey.failed("process group"):
        return
    rounds = {
        "pairs in a machine": network.pairs_within_machines(nodes),
        "pairs of machines": network.pairs_between_machines(nodes),
        "all ranks": [[list(range(ranks.world_size))]],
    }
    for check in rounds:
        for number in range(TRIES):
            for turn, groups in enumerate(rounds[check]):
                mine = next((group for group in groups if ranks.rank in group), [ranks.rank])
                found = attempt(
                    check, probes.measure_allreduce, f"{check} {turn}", mine, device
                )  # all ranks
                part = f"{check} {turn} {number}"
                survey.tell(part, keep_better(check, found, survey, probes.better_allreduce))
                if survey.failed(check):
                    return
            if not survey.suspects(check):
                break


def keep_better(check: str, found: Facts, survey: Survey, better: Callable[..., Any]) -> Facts:
    """Return what this rank found, or what it had found before where that was better."""
    before = survey.facts[survey.ranks.rank].get(check)
    if check in found and before is not None:
        return {check: better(found[check], before)}
    return found


def attempt(check: str, work: Callable[..., Any], *args: Any) -> Facts:
    """Return what a measurement gives, if anything, as a fact of this rank, or why it fails.

    It has a thread and a clock of its own: a link that does not answer can hold a collective of
    NCCL for ever.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    found: list[Facts] = []

    def measure() -> None:
        if device is not None:  # each thread has its own
            torch.cuda.set_device(device)
        try:
            value = work(*args)
            found.append({} if value is None else {check: value})
        except (RuntimeError, OSError) as error:
            found.append({"errors": {check: (str(error) or type(error).__name__).splitlines()[0]}})

    thread = threading.Thread(target=measure, name=check, daemon=True)
    thread.start()
    thread.join(ATTEMPT_S)
    return found[0] if found else {"errors": {check: f"no end within {ATTEMPT_S} s"}}
