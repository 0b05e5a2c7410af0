"""Find the files to read: by name, in folders, by globs, and in Hugging Face datasets."""

import glob
import hashlib
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from errors import BadInput

TEXT, LINES, ROWS = "text", "lines", "rows"  # one document or several; one per line; one per row
JSON_LINES = product((".jsonl", ".ndjson", ".json"), ("", ".gz", ".xz", ".zst", ".bz2"))
# By suffix: what the file holds, and the suffix of its compression.
KINDS = {
    ".txt": (TEXT, ""),
    ".parquet": (ROWS, ""),
    **{json + packing: (LINES, packing) for json, packing in JSON_LINES},
}
SUFFIXES = " ".join(KINDS)
# Dot files, and what Windows, macOS, network disks and office programs leave.
HIDDEN = re.compile(
    r"\.|~\$|(__MACOSX|lost\+found|\$RECYCLE\.BIN|System Volume Information|@eaDir)$"
)
MAX_NAMED = 5  # files in one warning
HUB = "hf://datasets/"
END_BYTES = 2**16  # at either end of a file: they tell it from another


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Args:
        name: For `shards.json`.
        url: A local path, or `hf://datasets/REPO@COMMIT/PATH`.
        n_bytes: Size as stored.
    """

    name: str
    url: str
    n_bytes: int

    def identity(self) -> dict[str, str | int]:
        """Return what tells this content from another; a hub file's is its commit."""
        values: dict[str, str | int] = {"name": self.name, "n_bytes": self.n_bytes}
        if self.url.startswith(HUB):
            return values
        with open(self.url, "rb") as file:
            head = file.read(END_BYTES)
            file.seek(max(0, self.n_bytes - END_BYTES))
            tail = file.read(END_BYTES)
        return values | {"sha256_of_ends": hashlib.sha256(head + tail).hexdigest()}

    @property
    def kind(self) -> str:
        """TEXT, LINES or ROWS."""
        return _kind(self.url)[0]

    @property
    def packing(self) -> str:
        """Suffix of the compression, or nothing."""
        return _kind(self.url)[1]


def _kind(name: str) -> tuple[str, str]:
    """Return kind and packing of a file by its name; nothing where it is of no known kind."""
    fitting = [suffix for suffix in KINDS if name.lower().endswith(suffix)]
    return KINDS[max(fitting, key=len)] if fitting else ("", "")


def find_files(inputs: list[str]) -> list[SourceFile]:
    """Return the files of `inputs` in order; a folder gives all that it holds, sorted by path.

    A plain `.json`, which is read as lines too, counts only where it is named. Other files of a
    folder are named in one warning.

    Raises:
        BadInput: An input does not exist, is of another kind, comes twice, or there is none.
    """
    files: list[SourceFile] = []
    left_out: dict[Path, str] = {}
    for path in _expand(inputs):
        if path.is_dir():
            found, others = list_folder(path)
            files += [_local_file(file, path) for file in found]
            left_out |= others
        elif _kind(path.name)[0]:
            files.append(_local_file(path, path.parent))
        else:
            raise BadInput(str(path), f"not one of {SUFFIXES}", "convert it to one of them")
    if left_out:
        print(f"warning: left out {_describe_left_out(left_out)}", file=sys.stderr)
    if not files:
        what = f"no file that ends in {SUFFIXES}"
        raise BadInput(" ".join(inputs), what, "give files of these kinds")
    url, times = Counter(os.path.realpath(file.url) for file in files).most_common(1)[0]
    if times > 1:
        raise BadInput(url, f"given {times} times", "name each file once")
    return files


def _local_file(path: Path, folder: Path) -> SourceFile:
    return SourceFile(str(path.relative_to(folder)), str(path), path.stat().st_size)


def _expand(inputs: list[str]) -> list[Path]:
    """Return the files and folders that are named, and those that globs find."""
    found: list[Path] = []
    for given in inputs:
        if given and Path(given).exists():
            found.append(Path(given))
            continue
        paths = [Path(path) for path in sorted(glob.glob(given, recursive=True))]
        if "**" in given:  # which finds the content of its folders too
            paths = [path for path in paths if path.is_file()]
        if not paths:
            raise BadInput(given, "no such file or folder", "give one that exists")
        found += paths
    return found


def list_folder(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the files below a folder that are text by their names, and the kinds of all others.

    Links are followed, into each folder once. Hidden files, and what is in hidden folders, are not
    text: editors, notebooks and operating systems keep copies and settings in them.
    """

    def refuse(error: OSError) -> None:
        if not _is_hidden(Path(error.filename).relative_to(folder)):
            what = f"cannot be read ({error.strerror})"
            raise BadInput(error.filename, what, "chmod +rx, or move it away")

    found: list[Path] = []
    others: dict[Path, str] = {}
    seen = {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inner = sorted(folders)
        folders.clear()  # os.walk goes into those that this list holds afterwards
        for name in inner:
            real = os.path.realpath(Path(here, name))
            if real not in seen:
                folders.append(name)
            seen.add(real)
        for path in [Path(here, name) for name in names]:
            if _is_hidden(path.relative_to(folder)):
                others[path] = "hidden"
            elif not path.is_file():
                others[path] = "no file"
            elif _kind(path.name)[0] and path.suffix.lower() != ".json":  # mostly settings
                found.append(path)
            else:
                others[path] = path.suffix or "no suffix"
    return sorted(found), others


def _is_hidden(path: Path) -> bool:
    return any(HIDDEN.match(part) for part in path.parts)


def _describe_left_out(kinds: dict[Path, str]) -> str:
    """Say how many files these are, how large, of which kinds, and name the largest."""
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in kinds}
    largest_first = sorted(sizes, key=lambda path: (-sizes[path], path))
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(kinds.values()).most_common())
    megabytes = sum(sizes.values()) / 1e6
    named = name_first([str(path) for path in largest_first])
    return f"{len(kinds)} files, {megabytes:.3g} MB ({counts}): {named}"


def name_first(names: list[str], at_most: int = MAX_NAMED) -> str:
    """Join the first few names, with an ellipsis where there are more."""
    shown = names[:at_most]
    if len(names) > at_most:
        shown.append("…")
    return ", ".join(shown)


def find_dataset(
    dataset: str, name: str | None, split: str, revision: str | None
) -> tuple[list[SourceFile], str]:
    """Return the files of a Hugging Face dataset, in its own order, and its commit.

    Args:
        dataset: Name on the hub, or a local folder laid out as the hub's are.
        name: Configuration, as in `load_dataset(dataset, name)`.
        split: Of the configuration.
        revision: Branch, tag or commit on the hub.

    Raises:
        BadInput: There is no such dataset, name or split, or its files are of another kind.
    """
    import datasets

    datasets.disable_progress_bars()
    flag = f"--dataset {dataset}"
    try:
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
    except (ValueError, OSError) as error:
        what = " ".join(str(error).split())
        raise BadInput(flag, what, "give a dataset of the hub, or a folder") from error
    splits: dict[str, Any] = dict(builder.config.data_files or {})
    if split not in splits:
        what = f"{dataset} has {', '.join(map(str, splits))}"
        raise BadInput(f"--split {split}", what, "give one of these")
    urls = [str(url) for url in splits[split]]
    others = [url for url in urls if not _kind(url)[0]]
    if others:
        remedy = "try the hub's own conversion, --revision refs/convert/parquet"
        raise BadInput(flag, f"{others[0]} is not one of {SUFFIXES}", remedy)
    if urls[0].startswith(HUB):
        return _hub_files(urls), split_url(urls[0])[1]
    folder = Path(dataset).resolve()
    return [_local_file(Path(url), folder) for url in urls], ""


def _hub_files(urls: list[str]) -> list[SourceFile]:
    from huggingface_hub import HfFileSystem

    hub: Any = HfFileSystem()
    # `info` asks once per folder and remembers what it holds.
    return [SourceFile(split_url(url)[2], url, hub.info(url)["size"]) for url in urls]


def split_url(url: str) -> tuple[str, str, str]:
    """Return repository, commit and path of `hf://datasets/REPO@COMMIT/PATH`."""
    repo, _, rest = url.removeprefix(HUB).partition("@")
    commit, _, path = rest.partition("/")
    return repo, commit, path
