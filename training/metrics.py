"""One line per step on the console, and the same numbers in log.txt, metrics.jsonl, TensorBoard.

`k train` is the loss of update k counted from 0; `k val` comes after k updates.
"""

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig, to_json
from training.devices import flops_of
from training.health import Verdict
from training.ranks import Ranks

Row = dict[str, Any]


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of one device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return flops_of(torch.cuda.get_device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return rss / (2**30 if sys.platform == "darwin" else 2**20)


def memory_line(device: torch.device) -> str:
    """Return the most memory held so far; of a GPU also what the allocator has reserved."""
    held = f"{peak_memory_gib(device):.2f}GiB"
    if device.type != "cuda":
        return held
    return f"{held} (reserved {torch.cuda.max_memory_reserved(device) / 2**30:.2f}GiB)"


class Metrics:
    """Writes the numbers of a run on rank 0; on the other ranks it does nothing.

    Args:
        config: The run.
        first_step: Updates done at the checkpoint resumed from; 0 for a new run, which starts the
            files anew. Rows of this step and later ones are dropped: they come again.
        ranks: This process and the others.
        device: Of this rank.
    """

    def __init__(
        self, config: TrainConfig, first_step: int, ranks: Ranks, device: torch.device
    ) -> None:
        self.config, self.device, self.is_main = config, device, ranks.is_main
        peak = peak_flops(device)
        self.peak_flops = peak * ranks.world_size if peak else None
        if self.is_main:
            self._open(first_step)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        run_dir = self.config.run_dir
        if first_step > 0:
            _rewrite(run_dir / "metrics.jsonl", lambda row: json.loads(row)["step"] < first_step)
            _rewrite(run_dir / "log.txt", lambda line: int(line.split()[0]) < first_step)
        mode = "a" if first_step > 0 else "w"  # without a checkpoint a run starts over
        self.log = (run_dir / "log.txt").open(mode, encoding="utf-8")
        self.jsonl = (run_dir / "metrics.jsonl").open(mode, encoding="utf-8")
        self.board = SummaryWriter(str(run_dir), purge_step=first_step)
        for summary in hparams(to_json(self.config), {"val/loss": 0.0}):
            self.board._get_file_writer().add_summary(summary)

    def train(self, verdicts: list[Verdict], lr: float, dt_s: float) -> None:
        """Write the last of some updates, its wall time in seconds, and complaints about all."""
        if not self.is_main:
            return
        step, loss, grad_norm, _ = verdicts[-1]
        config = self.config
        tokens_per_s = config.batch_tokens / dt_s
        flops_per_s = tokens_per_s * config.gpt_config.flops_per_token(config.seq_len)
        mfu = flops_per_s / self.peak_flops if self.peak_flops else None
        left = timedelta(seconds=int((config.max_steps - step - 1) * dt_s))
        _say(
            f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {grad_norm:.4f} | "
            f"dt: {dt_s * 1000:.2f}ms | tok/sec: {tokens_per_s:.2f} | "
            f"mfu: {'n/a' if mfu is None else f'{mfu:.1%}'} | "
            f"mem: {memory_line(self.device)} | left: {left}"
        )
        row = {"step": step, "train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm}
        row |= {"perf/tokens_per_s": tokens_per_s, "perf/mfu": mfu}
        self._write(row, f"{step} train {loss:.6f}")
        for verdict in verdicts:
            self._complain(verdict)

    def evaluation(self, step: int, loss: float, samples: list[str]) -> None:
        """Write what was evaluated after `step` updates: validation loss in nats, and texts."""
        if not self.is_main:
            return
        _say(f"step {step:5d} | validation loss: {loss:.4f}")
        for text in samples:
            _say(f"step {step:5d} | sample: {text!r}")
        self._write({"step": step, "val/loss": loss, "samples": samples}, f"{step} val {loss:.4f}")

    def hellaswag(self, step: int, result: dict[str, Any]) -> None:
        """Write the HellaSwag score after `step` updates, as `eval.hellaswag` returns it."""
        if not self.is_main:
            return
        acc, acc_norm = result["acc"], result["acc_norm"]
        _say(
            f"step {step:5d} | HellaSwag: acc {acc:.4f} acc_norm {acc_norm:.4f} "
            f"± {result['acc_norm_stderr']:.4f} of {result['n']}"
        )
        row = {"step": step, "eval/hellaswag_acc": acc, "eval/hellaswag_acc_norm": acc_norm}
        self._write(row, f"{step} hella {acc_norm:.4f}")

    def close(self) -> None:
        """Close every file."""
        for file in (self.log, self.jsonl, self.board) if self.is_main else ():
            with contextlib.suppress(OSError):  # said when the row was written
                file.close()

    def _complain(self, verdict: Verdict) -> None:
        if verdict.complaint:
            size = self.config.batch_tokens // self.config.seq_len
            first = verdict.step * size
            line = f"{verdict.complaint} (samples {first} to {first + size - 1})"
            _say(f"step {verdict.step:5d} | {line}")
            self.jsonl.write(json.dumps({"step": verdict.step, "complaint": line}) + "\n")

    def _write(self, row: Row, log_line: str) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        try:
            self.log.write(log_line + "\n")
            self.jsonl.write(json.dumps(finite, allow_nan=False) + "\n")
            self._to_board(row)
            for file in (self.log, self.jsonl, self.board):
                file.flush()
        except OSError as error:  # a full disk has no name
            raise OSError(error.errno, error.strerror, str(self.config.run_dir)) from error

    def _to_board(self, row: Row) -> None:
        for key, value in row.items():
            if "/" in key and value is not None:
                self.board.add_scalar(key, value, row["step"])
        for i, text in enumerate(row.get("samples", [])):
            self.board.add_text(f"samples/{i}", text, row["step"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _rewrite(path: Path, keep: Callable[[str], bool]) -> None:
    """Keep the lines of a file that `keep` accepts; a torn one goes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(
            ValueError, KeyError, TypeError, IndexError
        ):  # torn by a kill: it goes
            if line.endswith("\n") and keep(line):
                kept.append(line)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
