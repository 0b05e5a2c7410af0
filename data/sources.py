"""Where text comes from: files, folders, globs, and Hugging Face datasets by name."""

import glob
import gzip
import hashlib
import io
import lzma
import os
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

TEXT, LINES, ROWS = "text", "lines", "rows"  # one document; one per line; one per row
KINDS = {
    ".txt": (TEXT, ""),
    ".parquet": (ROWS, ""),
    **{f"{json}{pack}": (LINES, pack) for json in (".jsonl", ".json")
       for pack in ("", ".gz", ".xz", ".zst")},
}  # fmt: skip
HUB = "hf://datasets/"
BUFFER_BYTES = 2**20
END_BYTES = 2**16  # at the beginning and the end of a file, which tell it from another
READ_AHEAD_BYTES = 2**23  # of a file that is streamed from the hub


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
    fitting = [suffix for suffix in KINDS if name.endswith(suffix)]
    return KINDS[max(fitting, key=len)] if fitting else ("", "")


def find_files(inputs: list[str]) -> list[SourceFile]:
    """Return the files of `inputs` in order; a folder gives all that it holds, sorted by path.

    A plain `.json`, which is read as lines too, counts only where it is named.

    Raises:
        ValueError: An input does not exist, is of another kind, comes twice, or there is none.
    """
    files: list[SourceFile] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p.name)[0])
            found = [p for p in found if p.suffix != ".json"]  # mostly somebody's settings
        elif path.is_file():
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(given, recursive=True)) if Path(p).is_file()]
            if not found:
                raise ValueError(f"{given}: no such file or folder. Fix: give what exists")
        for p in found:
            if not _kind(p.name)[0]:
                raise ValueError(
                    f"{p}: not one of {' '.join(KINDS)}. Fix: convert it to one of them"
                )
            name = str(p.relative_to(path)) if path.is_dir() else p.name
            files.append(SourceFile(name, str(p), p.stat().st_size))
    if not files:
        raise ValueError(
            f"{' '.join(inputs)}: no file that ends in {' '.join(KINDS)}. Fix: give such"
        )
    url, times = Counter(os.path.realpath(file.url) for file in files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{url}: given {times} times. Fix: name each file once")
    return files


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
        return _hub_files(urls), _split_url(urls[0])[1]
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
    return [SourceFile(_split_url(url)[2], url, sizes[url]) for url in urls]


def _split_url(url: str) -> tuple[str, str, str]:
    """Return repository, commit and path of `hf://datasets/REPO@COMMIT/PATH`."""
    repo, _, rest = url.removeprefix(HUB).partition("@")
    commit, _, path = rest.partition("/")
    return repo, commit, path


def download(url: str) -> Path:
    """Download one file of a hub dataset into the hub's cache and check it.

    Raises:
        OSError: The network fails, or the file does not have the checksum that the hub states and
            is deleted.
    """
    from huggingface_hub import hf_hub_download

    repo, commit, name = _split_url(url)
    path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
    blob = path.resolve()  # the cache names a blob by the hub's checksum: SHA-256, or git's own
    with blob.open("rb") as file:
        if len(blob.name) == 2 * hashlib.sha256().digest_size:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            header = f"blob {blob.stat().st_size}\0".encode()
            digest = hashlib.sha1(header + file.read(), usedforsecurity=False).hexdigest()
    if digest != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError(f"{url} does not have the hub's checksum. Fix: start again")
    return path


class Opener:
    """Open source files one after another; the next hub file downloads meanwhile.

    Args:
        files: All of them, in order.
        streaming: Read hub files over the network as needed instead of downloading them.
    """

    def __init__(self, files: list[SourceFile], streaming: bool = False) -> None:
        self.files, self.streaming = files, streaming
        self._downloads: dict[int, Future[Path]] = {}

    def open(self, number: int) -> BinaryIO:
        """Open file `number` as it is stored."""
        url = self.files[number].url
        if not url.startswith(HUB):
            return open(url, "rb", buffering=BUFFER_BYTES)
        if self.streaming:
            from huggingface_hub import HfFileSystem

            stream: Any = HfFileSystem().open(url, "rb", block_size=READ_AHEAD_BYTES)
            return stream
        for i in (number, number + 1):
            if i < len(self.files) and i not in self._downloads:
                self._downloads[i] = Future()
                Thread(target=self._download, args=(i,), daemon=True).start()
        return self._downloads[number].result().open("rb")

    def _download(self, number: int) -> None:
        try:
            self._downloads[number].set_result(download(self.files[number].url))
        except Exception as error:  # raised where the file is opened
            self._downloads[number].set_exception(error)


def unpack(raw: BinaryIO, packing: str) -> BinaryIO:
    """Return the uncompressed stream of an open file."""
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value] # is one in all but name
    if packing == ".xz":
        return lzma.LZMAFile(raw)  # type: ignore[return-value] # likewise
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # type: ignore
    return raw
