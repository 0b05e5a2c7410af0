"""Every command of the documents goes through the parser of what it starts."""

import argparse
import functools
import importlib
import inspect
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import OneLineParser
from launch.planning.estimate import Candidate, Cluster, estimate
from training.config import parse_flags, resolve_train_config
from training.devices import get_device
from training.ds_config import load_ds_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    p.relative_to(ROOT)
    for folder in (".", "docs", "launch", "ds_configs")
    for p in sorted((ROOT / folder).glob("*.md"))
]
OURS = re.compile(
    r"(?:bench|checkpoint|data|docs|ds_configs|eval|launch|model|notebooks|tests)"
    r"/[\w./-]+\.(?:py|json|yaml|sbatch|example|md|ipynb)|train\.py"
)


class Parsed(BaseException):
    """What a command line is, to the program that it starts."""


def commands(text: str) -> Iterator[str]:
    """Yield each command: lines of code blocks (but of ```text), and code that begins with one."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
    for language, block in fence.findall(text):
        lines = block.splitlines()
        if any(line.startswith("$ ") for line in lines):  # with what they print
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        yield from lines if language != "text" else []
    text = fence.sub("", text)
    yield from re.findall(r"^    (make [\w-]+)", text, re.M)
    for code in re.findall(r"`([^`\n]+)`", text):
        program = code.split()[0]
        if code != program and program in CHECKS and (".py" in code or program in NO_SCRIPT):
            yield code


def split(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line, without variables before and files behind."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    while words:
        end = next((i for i, w in enumerate(words) if w in ("&&", "|", ">", ";")), len(words))
        start = next(i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w))
        yield words[start:end]
        words = words[end + 2 if words[end : end + 1] == [">"] else end + 1 :]


def check(words: list[str]) -> None:
    assert words[0] in CHECKS, f"{words[0]}: a program that no test knows"
    if "--help" not in words:
        pairs = itertools.pairwise(words)  # … is more of them, or the value of a flag
        given = [word for before, word in pairs if word != "…" or before.startswith("--")]
        CHECKS[words[0]](given, "…" in words)


def check_python(words: list[str], partial: bool) -> None:
    path, *argv = words
    assert (ROOT / path).is_file(), path
    if path == "train.py":
        config = resolve_train_config(**parse_flags(argv, ""))
        load_ds_config(ROOT / config.ds_config)
    elif path == "launch/cluster.py":
        check_deepspeed(argv or ["train.py"], partial)
    else:
        module: Any = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        main: Any = getattr(module, "main", lambda: module.build_parser().parse_args())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [path, *argv])
            patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
            if partial:  # … stands for what is required, too
                patch.setattr(OneLineParser, "error", ignore_what_is_required)
            with pytest.raises(Parsed):
                main(argv) if inspect.signature(main).parameters else main()


def only_parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
    _, unknown = parser.parse_known_args(argv)
    raise Parsed if not unknown else ValueError(f"{parser.prog}: {unknown}")


def ignore_what_is_required(parser: argparse.ArgumentParser, message: str) -> None:
    raise Parsed if "are required" in message else ValueError(f"{parser.prog}: {message}")


def check_deepspeed(words: list[str], partial: bool) -> None:
    from deepspeed.launcher.runner import parse_args

    args = parse_args(words)
    check_python([args.user_script, *args.user_args], partial)


def check_torchrun(words: list[str], partial: bool) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    check_python([args.training_script, *args.training_script_args], partial)


def check_make(words: list[str], _: bool) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _value = word.partition("=")
        assert re.search(rf"\$\({name}\)" if equals else rf"^{name}:", text, re.M), word


def check_pip(words: list[str], _: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {f".[{extra}]" for extra in project["optional-dependencies"]}
    assert set(words) <= {"install", "-c", "constraints.txt", "-e", ".", "torch"} | extras


def check_ranks_of_python(flags: set[str], words: list[str], partial: bool) -> None:
    own = words[: words.index("python")]
    assert {word.partition("=")[0] for word in own if word.startswith("-")} <= flags, own
    check_python(words[words.index("python") + 1 :], partial)


def check_sbatch(words: list[str], partial: bool) -> None:
    script = words.index("launch/slurm.sbatch")
    directives = re.findall(r"^#SBATCH (--[\w-]+)", (ROOT / words[script]).read_text(), re.M)
    assert {word for word in words[:script] if word.startswith("-")} <= set(directives)
    check_python(["train.py", *words[script + 1 :]], partial)


def check_kubectl(words: list[str], _: bool) -> None:
    assert words == ["apply", "-f", "launch/kubernetes.yaml"]


def check_tensorboard(words: list[str], _: bool) -> None:
    assert words == ["--logdir", "runs"]


CHECKS: dict[str, Any] = {
    "python": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "sbatch": check_sbatch,
    "kubectl": check_kubectl,
    "tensorboard": check_tensorboard,
    "cp": lambda words, _: len(words) == 2,
    "mpirun": functools.partial(check_ranks_of_python, {"-n", "-hostfile"}),
    "srun": functools.partial(
        check_ranks_of_python,
        {"--mpi", "-N", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"},
    ),
}
NO_SCRIPT = ("make", "pip", "sbatch", "kubectl", "tensorboard")
LINES = [
    (document, line)
    for document in DOCUMENTS
    for line in dict.fromkeys(commands((ROOT / document).read_text()))
]


@pytest.mark.parametrize(("document", "line"), LINES, ids=lambda value: str(value)[:60].strip())
def test_a_documented_command_is_understood(document: Path, line: str) -> None:
    for words in split(line):
        check(words)


RUNS = [
    line
    for _, line in LINES
    if re.search(r"(train|preflight)\.py.* --model", line)
    and "…" not in line
    and "--dry_run" not in line
]


@pytest.mark.parametrize("line", RUNS, ids=str)
def test_a_documented_run_fits_on_machines_of_8_h100(line: str) -> None:
    words = next(split(line))
    script = next(i for i, word in enumerate(words) if word.endswith(("train.py", "preflight.py")))
    config = resolve_train_config(**parse_flags(words[script + 1 :], ""))
    cluster = Cluster(get_device("h100"), 2 if "--hostfile" in words else 1, 8)
    assert estimate(config, Candidate(load_ds_config(ROOT / config.ds_config)), cluster).fits


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_files_that_a_document_names_are_there(document: Path) -> None:
    text = (ROOT / document).read_text()
    for name in re.findall(rf"(?<![\w./-])(?:{OURS.pattern})(?![\w/])", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --modle gpt2",
        "python train.py --model gpt9",
        "make cake",
        "rm -rf /",
        "python train.py --ds_config ds_configs/zero9.json",
        "python data/show.py a --setp 1",
        "deepspeed --num_gups 8 train.py",
        "deepspeed --num_gpus 8 train.py --lr",
        "torchrun --nproc_per_nodes 8 train.py",
        "python launch/start.py",
        "pip install -e '.[gpu]'",
    ],
)
def test_a_wrong_one_is_not(line: str) -> None:
    (words,) = split(line)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(words)
