"""Collect facts on every rank, and share them with all ranks."""

from __future__ import annotations

import contextlib
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
from launch.checks.checklist import compare_all, read_all, what_and_remedy
from launch.checks.compare import Facts
from training import probes
from training.ranks import Ranks
from training.rendezvous import choose_device, exchange, join
from training.run import Run

ATTEMPT_S = 60  # until a measurement is given up
TRIES = 5  # of a slow measurement: something else may have run there for a moment
TOKEN = ".preflight"  # a file in the run folder, with a number that only this survey has


class Survey:
    """The facts of all ranks, the same on all.

    Args:
        store: Of all ranks.
        ranks: Of this process.
        timeout_s: Until nobody waits longer for the facts of a rank.
    """

    def __init__(self, store: Store, ranks: Ranks, timeout_s: float) -> None:
        self.store, self.ranks, self.timeout_s = store, ranks, timeout_s
        self.facts: list[Facts] = [
            {"rank": rank, "host": "?", "errors": {}, "answers": None}
            for rank in range(ranks.world_size)
        ]

    def share(self, part: str, found: Facts) -> None:
        """Add what this rank found in a part of the survey, and what the others did (all ranks).

        Raises:
            TimeoutError: The facts of a rank did not come in time; the same on all ranks.
        """
        shared = exchange(self.store, self.ranks, part, found, self.timeout_s)  # all ranks
        for fact, more in zip(self.facts, shared, strict=True):
            if more is None:
                what = f"no answer about {part} within {self.timeout_s:.0f} s"
                fact["errors"]["answers"] = (what, "")
            else:
                fact["errors"] |= more.pop("errors", {})
                fact |= more
        if None in shared:
            raise TimeoutError(part)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each machine."""
        nodes: dict[str, list[int]] = {}
        for fact in self.facts:
            nodes.setdefault(fact["host"], []).append(fact["rank"])
        return list(nodes.values())

    def unfit_ranks(self, check: str) -> set[int]:
        """Return the ranks that a check finds unfit so far."""
        (outcome,) = [each for each in compare_all(self.facts) if each.check == check]
        return {rank for finding in outcome.findings for rank in finding.ranks}

    def failed(self, check: str) -> bool:
        """Return whether a rank has an error in this check."""
        return any(check in fact["errors"] for fact in self.facts)


def survey_all(run: Run, survey: Survey) -> None:
    """Fill in the facts (all ranks); what would hang after what was found is left out.

    Raises:
        TimeoutError: The facts of a rank did not come in time.
    """
    # Rank 0's token counts.
    survey.share("host names", {"host": socket.gethostname(), "token": secrets.token_hex(8)})
    survey.share("clocks", {"clock": time.time()})  # rank 0 has just let all go
    read_machine(run, survey)
    kinds = {fact["device"]["kind"] for fact in survey.facts if "device" in fact}
    cut_off = any(fact["connections"] for fact in survey.facts)
    if survey.failed("device") or len(kinds) > 1 or cut_off:
        return
    device = choose_device(run.ranks)
    measure_matmul_in_turns(survey, device)
    if not survey.failed("memory") and not survey.failed("matmul"):
        measure_allreduces(survey, device)


def read_machine(run: Run, survey: Survey) -> None:
    """Read this machine, the folders and the network (all ranks)."""
    token_file, token = run.config.run_dir / TOKEN, survey.facts[0]["token"]
    with network.listening() as address:
        own = read_all(run) | {"address": address}
        with contextlib.suppress(OSError):  # "run folder" says that it cannot be written to
            if run.ranks.is_main:
                token_file.write_text(token, encoding="utf-8")
        survey.share("machines and folders", own)
        addresses = [fact["address"] for fact in survey.facts]
        found: Facts = {"connections": network.unreached(addresses)}
        if "run folder" in survey.facts[0]:  # rank 0 could write
            found["run folder shared"] = network.has_token(token_file, token)
        survey.share("connections", found)
    with contextlib.suppress(OSError):
        if run.ranks.is_main:
            token_file.unlink()


def measure_matmul_in_turns(survey: Survey, device: torch.device) -> None:
    """Measure memory, and the speed of one rank of each machine after the other (all ranks)."""
    survey.share("memory", try_measure("memory", machine.read_memory, device))
    slow = set(range(survey.ranks.world_size))
    for number in range(TRIES):
        slow_of_nodes = [[rank for rank in node if rank in slow] for node in survey.nodes]
        for turn in range(max(map(len, slow_of_nodes))):
            in_turn = [node[turn] for node in slow_of_nodes if turn < len(node)]
            found: Facts = {}
            if survey.ranks.rank in in_turn:
                found = try_measure("matmul", probes.measure_matmul, device)
            survey.share(f"matmul {number} {turn}", keep_better("matmul", found, survey, max))
        slow = survey.unfit_ranks("matmul")
        if not slow or survey.failed("matmul"):
            return


def measure_allreduces(survey: Survey, device: torch.device) -> None:
    """Measure all-reduces, up to the first that fails (all ranks)."""
    timeout = datetime.timedelta(seconds=probes.ALLREDUCE_TIMEOUT_S)
    ranks, nodes = survey.ranks, survey.nodes
    check = "process group"
    survey.share(check, try_measure(check, join, survey.store, ranks, device, timeout))
    if survey.failed(check):
        return
    rounds = {
        "pairs in a machine": network.pairs_within_machines(nodes),
        "pairs of machines": network.pairs_between_machines(nodes),
        "all ranks": [[list(range(ranks.world_size))]],
    }
    for check, groups_by_turn in rounds.items():
        for number in range(TRIES):
            for turn, groups in enumerate(groups_by_turn):
                mine = next((group for group in groups if ranks.rank in group), [ranks.rank])
                # All ranks, also those in no pair: each makes as many process groups.
                name = f"{check} {turn}"
                found = try_measure(check, probes.measure_allreduce, name, mine, device)
                better = keep_better(check, found, survey, probes.better_allreduce)
                survey.share(f"{name} {number}", better)
                if survey.failed(check):
                    return
            if not survey.unfit_ranks(check):
                break


def keep_better(check: str, found: Facts, survey: Survey, better: Callable[..., Any]) -> Facts:
    """Return what this rank found, or what it had found before where that was better."""
    before = survey.facts[survey.ranks.rank].get(check)
    if check in found and before is not None:
        return {check: better(found[check], before)}
    return found


def try_measure(check: str, work: Callable[..., Any], *args: Any) -> Facts:
    """Return what a measurement gives, if anything, as a fact of this rank, or why it fails.

    It has a thread and a time limit of its own: a link that does not answer can hold a collective
    of NCCL for ever.
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
            found.append({"errors": {check: what_and_remedy(error)}})

    thread = threading.Thread(target=measure, name=check, daemon=True)
    thread.start()
    thread.join(ATTEMPT_S)
    return found[0] if found else {"errors": {check: (f"no end within {ATTEMPT_S} s", "")}}
