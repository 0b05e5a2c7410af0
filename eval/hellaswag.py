"""HellaSwag (Zellers et al. 2019) in completion style, as build-nanogpt scores it.

    python eval/hellaswag.py --ckpt runs/x
    deepspeed --num_gpus 8 eval/hellaswag.py --ckpt runs/x --details details.jsonl

acc takes the ending of the smallest summed, acc_norm that of the smallest mean cross-entropy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.opening import UNPACK_ERRORS, unpack
from data.tokenizer import load_tokenizer
from errors import BadInput
from eval.packing import FORWARD_TOKENS, N_ENDINGS, Example, crop_contexts, sum_ending_losses
from eval.session import check_at_least_1, check_gpt2_tokens, model_parser, open_session, run_main
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
        BadInput: Not such a file; names the line.
    """
    # One text at a time: tiktoken's threads (encode_batch) take five times as long on short texts.
    encode = load_tokenizer().encode_ordinary
    lines = enumerate(_read_lines(path)[:limit], 1)
    examples = [_read_example(line, f"{path}:{number}", encode) for number, line in lines]
    if not examples:
        raise BadInput(str(path), "has no rows", "give HellaSwag's JSON lines")
    n_hidden = sum(example.label is None for example in examples)
    if 0 < n_hidden < len(examples):
        raise BadInput(str(path), "some rows have a label, some have none", "label all or none")
    return examples


def _read_lines(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as raw, unpack(raw, path.suffix) as text:
            content = text.read()
    except (*UNPACK_ERRORS, ImportError, ValueError) as error:
        raise BadInput(f"--data {path}", f"cannot be read ({error})", "give a file") from error
    if path == VALIDATION and hashlib.sha256(content).hexdigest() != VALIDATION_SHA256:
        what = "is not the published validation set (wrong SHA-256)"
        raise BadInput(str(path), what, "restore it from git")
    return content.splitlines()


def _read_example(line: bytes, where: str, encode: Callable[[str], list[int]]) -> Example:
    try:
        row = json.loads(line)
        context, endings, label = row["ctx"], row["endings"], row.get("label")
        has_four = isinstance(endings, list) and len(endings) == N_ENDINGS
        if not has_four or not all(isinstance(t, str) and t for t in (context, *endings)):
            raise ValueError("needs a context and four endings")
        is_hidden = label in (None, "")
        if not is_hidden and str(label) not in LABELS:
            raise ValueError(f"label {label!r} is not 0 to 3")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(where, f"is not a HellaSwag row ({error})", "fix the row") from error
    endings_tokens = [encode(f" {ending}") for ending in endings]
    return Example(encode(context), endings_tokens, None if is_hidden else int(label))


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
        stderr = math.sqrt(acc * (1 - acc) / len(hits))
        result[name] = None if hidden else acc
        result[f"{name}_stderr"] = None if hidden else stderr
    return result


def score_model(session: Session, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the score of the session's model on rows that fit it (all ranks)."""
    return score(session.sum(sum_ending_losses(session, examples)), examples)


def write_details(path: Path, losses: Tensor, examples: Sequence[Example]) -> None:
    """Write one JSON line per row: its losses in nats, what was predicted, and the label."""
    by_sum, by_mean = predict(losses, examples)
    with path.open("w", encoding="utf-8") as file:
        for row, example in enumerate(examples):
            line = {
                "row": row,
                "label": example.label,
                "pred": int(by_sum[row]),
                "pred_norm": int(by_mean[row]),
                "loss_sums": losses[row].tolist(),
                "ending_tokens": [len(ending) for ending in example.endings],
            }
            file.write(json.dumps(line) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = model_parser(__doc__ or "")
    data_help = "rows: .jsonl, also .gz .xz .zst (default: the validation set)"
    parser.add_argument("--data", type=Path, default=VALIDATION, help=data_help)
    parser.add_argument("--limit", type=int, help="score only the first LIMIT rows (default: all)")
    parser.add_argument("--details", type=Path, help="file for the losses of every row, JSON lines")
    tokens_help = "most tokens in a forward (default: %(default)s)"
    parser.add_argument("--forward_tokens", type=int, default=FORWARD_TOKENS, help=tokens_help)
    return parser


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Score the checkpoint (all ranks) and return the result.

    Raises:
        BadInput: The checkpoint, a row or a flag cannot be used; names it.
    """
    check_at_least_1(args, "limit", "forward_tokens")
    if args.details:
        try:
            args.details.open("a", encoding="utf-8").close()  # before the work, not after it
        except OSError as error:
            what = f"cannot be written ({error.strerror})"
            raise BadInput(f"--details {args.details}", what, "give another file") from error
    examples = load_examples(args.data, args.limit)
    session = open_session(args, ranks)
    check_gpt2_tokens(session.config)
    cropped = crop_contexts(examples, session.config.block_size)
    options = {"forward_tokens": args.forward_tokens, "show_progress": ranks.is_main}
    with session.computing():
        losses = session.sum(sum_ending_losses(session, cropped, **options))
    if not losses.isfinite().all():
        raise BadInput(session.ckpt, "gives losses that are not finite", "score an earlier step")
    if args.details and ranks.is_main:
        write_details(args.details, losses, cropped)
    scores = score(losses, cropped)
    session.say(format_scores(scores))
    pairs = zip(examples, cropped, strict=True)
    n_cropped = sum(len(whole.context) > len(part.context) for whole, part in pairs)
    result = {"ckpt": session.ckpt, "data": args.data.name, **scores}
    return result | {"cropped": n_cropped, "dtype": session.precision}


def format_scores(scores: dict[str, Any]) -> str:
    """Return the scores as a line for people."""
    if scores["acc"] is None:
        return f"HellaSwag: {scores['n']:,} rows without labels; --details has the predictions"
    return (
        "HellaSwag: acc {acc:.4f} ± {acc_stderr:.4f}, acc_norm {acc_norm:.4f} ± "
        "{acc_norm_stderr:.4f} of {n:,} rows (± one standard error)".format(**scores)
    )


if __name__ == "__main__":
    run_main(build_parser(), run)
