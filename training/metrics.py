"""Print one line per step; write the same numbers to log.txt, metrics.jsonl and TensorBoard.

`k train` is the loss of update k counted from 0; `k val` comes after k updates.
"""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from checkpoint.manifest import write_atomically
from training.config import TrainConfig, to_json
from training.devices import GIB, flops_of
from training.health import Verdict
from training.ranks import Ranks


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of one device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return flops_of(torch.cuda.get_device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return rss * unit_bytes / GIB


def memory_line(device: torch.device) -> str:
    """Return the most memory held so far; of a GPU also what the allocator has reserved."""
    held = f"{peak_memory_gib(device):.2f}GiB"
    if device.type != "cuda":
        return held
    return f"{held} (reserved {torch.cuda.max_memory_reserved(device) / GIB:.2f}GiB)"


class Metrics:
    """Writes the numbers of a run on rank 0; on the other ranks it writes nothing.

    Args:
        config: The run.
        first_step: Updates done at the checkpoint resumed from; 0 for a new run, which empties
            the files. Rows of this step and later ones are dropped: they come again.
        ranks: This process and the others.
        device: Of this rank.
    """

    def __init__(
        self, config: TrainConfig, first_step: int, ranks: Ranks, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.is_main = ranks.is_main
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
        shown_mfu = f"{mfu:.1%}" if mfu is not None else "n/a"
        left = timedelta(seconds=int((config.max_steps - step - 1) * dt_s))
        _say(
            step,
            f"loss: {loss:.6f} | lr {lr:.4e} | norm: {grad_norm:.4f} | "
            f"dt: {dt_s * 1000:.2f}ms | tok/sec: {tokens_per_s:.2f} | mfu: {shown_mfu} | "
            f"mem: {memory_line(self.device)} | left: {left}",
        )
        row = {"step": step, "train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm}
        row |= {"perf/tokens_per_s": tokens_per_s, "perf/mfu": mfu}
        self._write(row, f"{step} train {loss:.6f}")
        for verdict in verdicts:
            if verdict.complaint:
                self._complain(verdict)

    def evaluation(self, step: int, loss: float, samples: list[str]) -> None:
        """Write what was evaluated after `step` updates: validation loss in nats, and texts."""
        if not self.is_main:
            return
        _say(step, f"validation loss: {loss:.4f}")
        for text in samples:
            _say(step, f"sample: {text!r}")
        self._write({"step": step, "val/loss": loss, "samples": samples}, f"{step} val {loss:.4f}")

    def hellaswag(self, step: int, result: dict[str, Any]) -> None:
        """Write the HellaSwag score after `step` updates, as `eval.hellaswag` returns it."""
        if not self.is_main:
            return
        acc, acc_norm = result["acc"], result["acc_norm"]
        error, n_rows = result["acc_norm_stderr"], result["n"]
        line = f"HellaSwag: acc {acc:.4f} acc_norm {acc_norm:.4f} ± {error:.4f} of {n_rows}"
        _say(step, line)
        row = {"step": step, "eval/hellaswag_acc": acc, "eval/hellaswag_acc_norm": acc_norm}
        self._write(row, f"{step} hella {acc_norm:.4f}")

    def close(self) -> None:
        """Close every file."""
        if not self.is_main:
            return
        for file in (self.log, self.jsonl, self.board):
            with contextlib.suppress(OSError):  # the write of the row has raised it
                file.close()

    def _complain(self, verdict: Verdict) -> None:
        size = self.config.batch_tokens // self.config.seq_len
        first = verdict.step * size
        line = f"{verdict.complaint} (samples {first} to {first + size - 1})"
        _say(verdict.step, line)
        self.jsonl.write(json.dumps({"step": verdict.step, "complaint": line}) + "\n")

    def _write(self, row: dict[str, Any], log_line: str) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        try:
            self.log.write(log_line + "\n")
            self.jsonl.write(json.dumps(finite, allow_nan=False) + "\n")
            self._to_board(row)
            for file in (self.log, self.jsonl, self.board):
                file.flush()
        except OSError as error:  # that of a full disk lacks the file's name
            raise OSError(error.errno, error.strerror, str(self.config.run_dir)) from error

    def _to_board(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if "/" in key and value is not None:
                self.board.add_scalar(key, value, row["step"])
        for i, text in enumerate(row.get("samples", [])):
            self.board.add_text(f"samples/{i}", text, row["step"])


def _say(step: int, line: str) -> None:
    print(f"step {step:5d} | {line}", file=sys.stderr, flush=True)


def _rewrite(path: Path, keep: Callable[[str], bool]) -> None:
    """Keep the lines of a file that `keep` accepts; a torn one goes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True):
        # A line that a kill has torn makes `keep` raise: it goes.
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
            if line.endswith("\n") and keep(line):
                kept.append(line)
    write_atomically(path, "".join(kept))
