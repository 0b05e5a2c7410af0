"""Where text comes from: files, folders, globs, and Hugging Face datasets by name."""

import glob
import hashlib
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, LINES, ROWS = "text", "lines", "rows"  # one document; one per line; one per row
KINDS = {
    ".txt": (TEXT, ""),
    ".parquet": (ROWS, ""),
    **{f"{json}{pack}": (LINES, pack) for json in (".jsonl", ".ndjson", ".json")
       for pack in ("", ".gz", ".xz", ".zst", ".bz2")},
}  # fmt: skip
# Dot files, and what Windows, macOS, network disks and office programs leave.
HIDDEN = re.compile(
    r"\.|~\$|(__MACOSX|lost\+found|\$RECYCLE\.BIN|System Volume Information|@eaDir)$"
)
MAX_NAMED = 5  # of the files that are left out
HUB = "hf://datasets/"
END_BYTES = 2**16  # at the beginning and the end of a file, which tell it from another


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
            ends = hashlib.sha256(head + file.read(END_BYTES))
        return values | {"sha256_of_ends": ends.hexdigest()}

    @property
    def kind(self) -> str:
        """TEXT, LINES or ROWS."""
        return _kind(self.url)[0]

    @property
    def packing(self) -> str:
        """Suffix of the compression, or nothing."""
        return _kind(self.url)[1]


def _kind(name: str) -> tuple[str, str]:
    """Return kind and packing of a file by its name; nothing where it is none of ours."""
    fitting = [suffix for suffix in KINDS if name.lower().endswith(suffix)]
    return KINDS[max(fitting, key=len)] if fitting else ("", "")


def find_files(inputs: list[str]) -> list[SourceFile]:
    """Return the files of `inputs` in order; a folder gives all that it holds, sorted by path.

    A plain `.json`, which is read as lines too, counts only where it is named. What a folder holds
    beside is named in one line on stderr.

    Raises:
        ValueError: An input does not exist, is of another kind, comes twice, or there is none.
    """
    files: list[SourceFile] = []
    left_out: dict[Path, str] = {}
    for given in inputs:
        for path in _expand(given):
            if path.is_dir():
                found, others = _look_into(path)
                left_out |= others
            else:
                found = [path]
            for p in found:
                if not _kind(p.name)[0]:
                    raise ValueError(
                        f"{p}: not one of {' '.join(KINDS)}. Fix: convert it to one of them"
                    )
                name = str(p.relative_to(path)) if path.is_dir() else p.name
                files.append(SourceFile(name, str(p), p.stat().st_size))
    if left_out:
        print(f"warning: left out {_describe(left_out)}", file=sys.stderr)
    if not files:
        raise ValueError(
            f"{' '.join(inputs)}: no file that ends in {' '.join(KINDS)}. Fix: give such"
        )
    url, times = Counter(os.path.realpath(file.url) for file in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{url}: given {times} times. Fix: name each file once")
    return files


def _expand(given: str) -> list[Path]:
    """Return the file or folder of that name, or what a glob finds."""
    if given and Path(given).exists():
        return [Path(given)]
    found = [Path(p) for p in sorted(glob.glob(given, recursive=True))]
    if "**" in given:  # which finds all that its folders hold
        found = [p for p in found if p.is_file()]
    if not found:
        raise ValueError(f"{given}: no such file or folder. Fix: give what exists")
    return found


def _look_into(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the files below a folder that are text by their names, and the kinds of all others.

    Links are followed, into each folder once. Hidden files, and what is in hidden folders, are not
    text: editors, notebooks and operating systems keep copies and settings in them.
    """

    def refuse(error: OSError) -> None:
        if not _is_hidden(Path(error.filename).relative_to(folder)):
            raise ValueError(
                f"{error.filename}: cannot be read ({error.strerror}). Fix: chmod +rx, or move it "
                "away"
            )

    found, others, seen = [], {}, {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inner = sorted(folders)
        folders.clear()
        for name in inner:
            real = os.path.realpath(Path(here, name))
            folders += [name] if real not in seen else []
            seen.add(real)
        for name in names:
            path = Path(here, name)
            is_text = _kind(name)[0] and path.suffix.lower() != ".json"  # mostly settings
            if _is_hidden(path.relative_to(folder)):
                others[path] = "hidden"
            elif not path.is_file():
                others[path] = "no file"
            elif is_text:
                found.append(path)
            else:
                others[path] = path.suffix or "no suffix"
    return sorted(found), others


def _is_hidden(path: Path) -> bool:
    return any(HIDDEN.match(part) for part in path.parts)


def _describe(kinds: dict[Path, str]) -> str:
    """Say how many files these are, how large, of which kinds, and name the largest."""
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in kinds}
    paths = sorted(sizes, key=lambda path: (-sizes[path], path))
    named = ", ".join(map(str, paths[:MAX_NAMED])) + ", …" * (len(paths) > MAX_NAMED)
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(kinds.values()).most_common())
    return f"{len(paths)} files, {sum(sizes.values()) / 1e6:.3g} MB ({counts}): {named}"


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
        ValueError: There is no such dataset, name or split, or its files are of another kind.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--dataset {dataset}: {' '.join(str(error).split())}. "
            "Fix: give a dataset of the hub, or a folder"
        ) from error
    splits: dict[str, Any] = dict(builder.config.data_files or {})
    if split not in splits:
        raise ValueError(
            f"--split {split}: {dataset} has {', '.join(map(str, splits))}. Fix: give one"
        )
    urls = [str(url) for url in splits[split]]
    if other := [url for url in urls if not _kind(url)[0]]:
        raise ValueError(
            f"--dataset {dataset}: {other[0]} is not one of {' '.join(KINDS)}. Fix: try the hub's "
            "own conversion, --revision refs/convert/parquet"
        )
    if urls[0].startswith(HUB):
        return _hub_files(urls), split_url(urls[0])[1]
    names = [str(Path(url).relative_to(Path(dataset).resolve())) for url in urls]
    sizes = [Path(url).stat().st_size for url in urls]
    return [SourceFile(*file) for file in zip(names, urls, sizes, strict=True)], ""


def _hub_files(urls: list[str]) -> list[SourceFile]:
    from huggingface_hub import HfFileSystem

    hub: Any = HfFileSystem()
    sizes: dict[str, int] = {}
    for folder in {url.rpartition("/")[0] for url in urls}:  # one request for all its files
        for entry in hub.ls(folder, detail=True):
            sizes[f"hf://{entry['name']}"] = entry["size"]
    return [SourceFile(split_url(url)[2], url, sizes[url]) for url in urls]


def split_url(url: str) -> tuple[str, str, str]:
    """Return repository, commit and path of `hf://datasets/REPO@COMMIT/PATH`."""
    repo, _, rest = url.removeprefix(HUB).partition("@")
    commit, _, path = rest.partition("/")
    return repo, commit, path
