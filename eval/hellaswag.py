"""HellaSwag (Zellers et al. 2019) in completion style, as build-nanogpt scores it.

    python eval/hellaswag.py --ckpt runs/x
    deepspeed --num_gpus 8 eval/hellaswag.py --ckpt runs/x --details details.jsonl

acc takes the ending of the smallest summed, acc_norm that of the smallest mean cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.packing import FORWARD_TOKENS, N_ENDINGS, Example, crop_contexts, sum_losses
from eval.session import add_model_flags, check_gpt2_tokens, run_as_program, say, start_session
from training.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from eval.session import Session

VALIDATION = Path(__file__).parent / "published" / "hellaswag_val.jsonl.xz"
VALIDATION_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # unpacked
LABELS = ("0", "1", "2", "3")


def load_examples(path: Path = VALIDATION, limit: int | None = None) -> list[Example]:
    """Read and tokenise HellaSwag rows: JSON lines, also as .gz, .xz, .zst.

    Args:
        path: The rows; the validation set is carried in the repository.
        limit: Only the first so many rows.

    Raises:
        ValueError: Not such a file; names the line.
    """
    from data.tokenizer import load_tokenizer

    rows = [_read_row(line, f"{path}:{n}") for n, line in enumerate(_read_lines(path)[:limit], 1)]
    if not rows:
        raise ValueError(f"{path}: no rows. Fix: give HellaSwag's JSON lines")
    if len({label is None for *_, label in rows}) > 1:
        raise ValueError(f"{path}: some rows have a label, some have none. Fix: label all or none")
    encode = load_tokenizer().encode_ordinary  # tiktoken's threads take five times as long
    return [
        Example(encode(context), [encode(f" {ending}") for ending in endings], label)
        for context, endings, label in rows
    ]


def _read_lines(path: Path) -> list[bytes]:
    import hashlib
    import lzma
    import zlib

    from data.opening import unpack

    try:
        with path.open("rb") as raw, unpack(raw, path.suffix) as text:
            content = text.read()
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"--data {path}: cannot be read ({error}). Fix: give a file") from error
    if path == VALIDATION and hashlib.sha256(content).hexdigest() != VALIDATION_SHA256:
        raise ValueError(f"{path}: not the published validation set (SHA-256). Fix: restore it")
    return content.splitlines()


def _read_row(line: bytes, where: str) -> tuple[str, list[str], int | None]:
    try:
        row = json.loads(line)
        context, endings, label = row["ctx"], row["endings"], row.get("label")
        fits = isinstance(endings, list) and len(endings) == N_ENDINGS
        if not fits or not all(isinstance(text, str) and text for text in (context, *endings)):
            raise ValueError("needs a context and four endings")
        if label in (None, ""):
            return context, endings, None
        if str(label) not in LABELS:
            raise ValueError(f"label {label!r} is not 0 to 3")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: not a HellaSwag row ({error}). Fix: mend it") from error
    return context, endings, int(label)


def predict(losses: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return the endings of the smallest summed and of the smallest mean loss, (n,) each."""
    import torch

    lengths = torch.tensor([[len(ending) for ending in e.endings] for e in examples])
    return losses.argmin(1), (losses / lengths).argmin(1)


def score(losses: Tensor, examples: Sequence[Example]) -> dict[str, float | int | None]:
    """Return n, acc (summed loss) and acc_norm (mean loss), with their standard errors.

    Accuracies are None where the labels are hidden.
    """
    result: dict[str, float | int | None] = {"n": len(examples)}
    hidden = examples[0].label is None
    for name, predicted in zip(("acc", "acc_norm"), predict(losses, examples), strict=True):
        hits = [p == e.label for p, e in zip(predicted.tolist(), examples, strict=True)]
        acc = sum(hits) / len(hits)
        result[name] = None if hidden else acc
        result[f"{name}_stderr"] = None if hidden else math.sqrt(acc * (1 - acc) / len(hits))
    return result


def ending_losses(session: Session, examples: Sequence[Example], **options: Any) -> Tensor:
    """Return the summed loss of each ending over all ranks, (n, 4) (all ranks).

    Args:
        session: The model.
        examples: Rows that fit the model.
        options: Of `eval.packing.sum_losses`.
    """
    return session.sum(sum_losses(session.model, examples, **options, **session.share))


def score_model(session: Session, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the score of the session's model on rows that fit it (all ranks)."""
    return score(ending_losses(session, examples), examples)


def write_details(path: Path, losses: Tensor, examples: Sequence[Example]) -> None:
    """Write one JSON line per row: its losses in nats, what was predicted, and the label."""
    columns = (losses.tolist(), *(column.tolist() for column in predict(losses, examples)))
    with path.open("w", encoding="utf-8") as file:
        for row, (sums, by_sum, by_mean) in enumerate(zip(*columns, strict=True)):
            example = examples[row]
            lengths = [len(ending) for ending in example.endings]
            line = {"row": row, "label": example.label, "pred": by_sum, "pred_norm": by_mean}
            line |= {"loss_sums": sums, "ending_tokens": lengths}
            file.write(json.dumps(line) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument(
        "--data", type=Path, default=VALIDATION,
        help="rows: .jsonl, also .gz .xz .zst (default: the validation set)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first so many rows (default: all)")
    parser.add_argument("--details", type=Path, help="file for the losses of every row, JSON lines")
    parser.add_argument(
        "--forward_tokens",
        type=int,
        default=FORWARD_TOKENS,
        help="most tokens in a forward (default: 8192)",
    )
    return parser


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Score the checkpoint (all ranks) and return the result.

    Raises:
        ValueError: Bad checkpoint, rows or flag; names it.
    """
    for name in ("limit", "forward_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: out of range. Fix: give at least 1")
    if args.details:
        try:
            args.details.open("a", encoding="utf-8").close()  # before the work, not after it
        except OSError as error:
            raise ValueError(
                f"--details {args.details}: {error.strerror}. Fix: give another place"
            ) from error
    examples = load_examples(args.data, args.limit)
    from checkpoint.reader import load_model, resolve_ckpt

    ckpt = resolve_ckpt(args.ckpt)
    model, run_precision = load_model(ckpt)
    check_gpt2_tokens(model.config)
    fitting = crop_contexts(examples, model.config.block_size)
    session = start_session(model, args.dtype or run_precision, ranks)
    with session.context():
        options = {"forward_tokens": args.forward_tokens, "show_progress": ranks.is_main}
        losses = ending_losses(session, fitting, **options)
    if not losses.isfinite().all():
        raise ValueError(
            f"{ckpt}: gives losses that are no finite numbers. Fix: score an earlier step"
        )
    if args.details and ranks.is_main:
        write_details(args.details, losses, fitting)
    n_cropped = sum(len(a.context) > len(b.context) for a, b in zip(examples, fitting, strict=True))
    result = score(losses, fitting) | {"cropped": n_cropped, "dtype": session.precision}
    say(ranks, describe(result))
    return {"ckpt": ckpt, "data": args.data.name} | result


def describe(result: dict[str, Any]) -> str:
    """Return the result as a line for people."""
    if result["acc"] is None:
        return f"HellaSwag: {result['n']:,} rows without labels; --details has the predictions"
    return (
        "HellaSwag: acc {acc:.4f} ± {acc_stderr:.4f}, acc_norm {acc_norm:.4f} ± "
        "{acc_norm_stderr:.4f} of {n:,} rows (± one standard error)".format(**result)
    )


if __name__ == "__main__":
    run_as_program(build_parser(), run)
