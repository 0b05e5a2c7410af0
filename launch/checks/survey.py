"""Collect facts on every rank, and share them with all ranks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  # documented

from launch.checks import machine, network
from launch.checks.checklist import CHECKS, compare_all, read_all, what_and_remedy
from launch.checks.compare import Facts
from training import probes
from training.ranks import Ranks
from training.rendezvous import all_gather_json, choose_device, join_process_group
from training.run import Run

ATTEMPT_S = 60  # until a measurement is given up
TRIES = 5  # of a slow measurement: something else may have run there for a moment
Work = Callable[..., Any]  # returns a JSON value
TOKEN = ".preflight"  # a file in the run folder, with a number that only this survey has


class StopSurvey(Exception):  # noqa: N818  # no error: what is missing is among the facts
    """Stop the survey: later measurements would hang."""


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
            StopSurvey: The facts of a rank did not come in time; the same on all ranks.
        """
        shared = all_gather_json(self.store, self.ranks, part, found, self.timeout_s)  # all ranks
        for fact, more in zip(self.facts, shared, strict=True):
            if more is None:
                what = f"no answer about {part} within {self.timeout_s:.0f} s"
                fact["errors"]["answers"] = (what, "")
            else:
                fact["errors"] |= more.pop("errors", {})
                fact |= more
        if None in shared:
            raise StopSurvey(part)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each machine."""
        nodes: dict[str, list[int]] = {}
        for fact in self.facts:
            nodes.setdefault(fact["host"], []).append(fact["rank"])
        return list(nodes.values())

    def unfit_ranks(self, check: str) -> set[int]:
        """Return the ranks that a check finds unfit so far."""
        findings = [each for each in compare_all(self.facts).findings if each.check == check]
        return set().union(*(finding.ranks for finding in findings))

    def measure(self, check: str, part: str, work: Work, better: Work = max) -> None:
        """Measure under a time limit, and share what this rank has found so far (all ranks).

        Args:
            check: Name of the check that judges the value.
            part: Key in the store; each call needs a new one.
            work: Returns a value; None: nothing for this rank.
            better: Returns the better one of this value and the one before.

        Raises:
            StopSurvey: A rank has failed, or was too late; the same on all ranks.
        """
        assert any(check == known.name for known in CHECKS)  # else nobody would judge it
        found = try_measure(check, work)
        before = self.facts[self.ranks.rank].get(check)
        if check in found and before is not None:
            found[check] = better(found[check], before)
        self.share(part, found)
        if any(check in fact["errors"] for fact in self.facts):
            raise StopSurvey(part)


def survey_all(run: Run, survey: Survey) -> None:
    """Fill in the facts (all ranks); what would hang after what was found is left out.

    Raises:
        StopSurvey: A rank has failed, or was too late; the same on all ranks.
    """
    # Only rank 0's token is used.
    survey.share("host names", {"host": socket.gethostname(), "token": secrets.token_hex(8)})
    survey.share("clocks", {"clock": time.time()})  # rank 0 has just released all ranks at once
    read_machine(run, survey)
    kinds = {fact.get("device", {}).get("kind", "none") for fact in survey.facts}
    cut_off = any(fact["connections"] for fact in survey.facts)
    if len(kinds) > 1 or "none" in kinds or cut_off:
        return
    device = choose_device(run.ranks)
    survey.measure("memory", "memory", functools.partial(machine.read_memory, device))
    measure_matmul_in_turns(survey, device)
    timeout = datetime.timedelta(seconds=probes.ALLREDUCE_TIMEOUT_S)
    join = functools.partial(join_process_group, survey.store, run.ranks, device, timeout)
    survey.measure("process group", "process group", join)
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
    """Measure one rank of each machine after the other, and the slow ones again (all ranks)."""
    rank = survey.ranks.rank
    slow = set(range(survey.ranks.world_size))
    for number in range(TRIES):
        for turn, in_turn in enumerate(itertools.zip_longest(*survey.nodes)):
            is_mine = rank in in_turn and rank in slow
            work = functools.partial(probes.measure_matmul, device) if is_mine else lambda: None
            survey.measure("matmul", f"matmul {number} {turn}", work)
        slow = survey.unfit_ranks("matmul")
        if not slow:
            return


def measure_allreduces(survey: Survey, device: torch.device) -> None:
    """Measure all-reduces of two ranks, two machines, and all (all ranks)."""
    rank, nodes = survey.ranks.rank, survey.nodes
    checks = {
        "pairs in a machine": network.pairs_within_machines(nodes),
        "pairs of machines": network.pairs_between_machines(nodes),
        "all ranks": [[list(range(survey.ranks.world_size))]],
    }
    for check, number in itertools.product(checks, range(TRIES)):
        if number and not survey.unfit_ranks(check):
            continue
        for turn, groups in enumerate(checks[check]):
            # All ranks, also those in no pair: each makes as many process groups.
            group = next((group for group in groups if rank in group), [rank])
            name = f"{check} {turn}"
            work = functools.partial(probes.measure_allreduce, name, group, device)
            survey.measure(check, f"{name} {number}", work, probes.better_allreduce)


def try_measure(check: str, work: Work) -> Facts:
    """Return what a measurement gives, if anything, as a fact of this rank, or why it fails.

    It has a thread and a time limit of its own: a link that does not answer can hold a collective
    of NCCL for ever. Nobody waits for such a thread: `leave` ends the process at once.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    if torch.cuda.is_initialized():  # each thread has its own current device
        pool.submit(torch.cuda.set_device, torch.cuda.current_device())
    try:
        value = pool.submit(work).result(ATTEMPT_S)
    except TimeoutError:
        return {"errors": {check: (f"no end within {ATTEMPT_S} s", "")}}
    except (RuntimeError, OSError) as error:
        return {"errors": {check: what_and_remedy(error)}}
    return {} if value is None else {check: value}
