"""Open source files as they are stored, downloaded or streamed, and decompress them."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import re
import sys
import zlib
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

# LZMAFile and BZ2File end without an error at data that is damaged; what they read with raises.
try:
    from _compression import DecompressReader  # type: ignore # a private module
except ImportError:
    from compression._common._streams import DecompressReader  # type: ignore # its name in 3.14

from data.index import hash_file
from data.sources import HUB, SourceFile, split_url

DECOMPRESSORS: dict[str, Any] = {".xz": lzma.LZMADecompressor, ".bz2": bz2.BZ2Decompressor}
UNPACK_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
with contextlib.suppress(ImportError):  # without it only .zst cannot be read
    zstd: Any = import_module(ZSTD)
    # 2 GiB of memory at most, as zstd --long=31 needs; by default 128 MiB.
    options = {zstd.DecompressionParameter.window_log_max: 31}
    DECOMPRESSORS[".zst"] = partial(zstd.ZstdDecompressor, options=options)
    UNPACK_ERRORS += (zstd.ZstdError,)
# How a packed file begins, or JSON lines that were unpacked on their way.
PACKED = rb"(?P<gz>\x1f\x8b)|(?P<xz>\xfd7zXZ)|(?P<bz2>BZh)|(?P<zst>\(\xb5/\xfd)|(?P<json>\s*[{[])"
HEAD_BYTES = 1024
BUFFER_BYTES = 2**20
READ_AHEAD_BYTES = 2**23  # of a file that is streamed from the hub
SHA256_LETTERS = 64


def download(url: str) -> Path:
    """Download one file of a hub dataset into the hub's cache and check it.

    Raises:
        OSError: The network fails, or the file does not have the checksum that the hub states and
            is deleted.
    """
    from huggingface_hub import hf_hub_download

    repo, commit, name = split_url(url)
    path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
    # The cache names a blob by the hub's checksum: SHA-256 for large files, else git's own SHA-1.
    blob = path.resolve()
    if len(blob.name) == SHA256_LETTERS:
        digest = hash_file(blob)
    else:
        content = blob.read_bytes()
        git_object = b"blob %d\0" % len(content) + content
        digest = hashlib.sha1(git_object, usedforsecurity=False).hexdigest()
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
                # A daemon, unlike an executor's threads: Ctrl-C does not wait for the download.
                Thread(target=self._download, args=(i,), daemon=True).start()
        return self._downloads[number].result().open("rb")

    def _download(self, number: int) -> None:
        try:
            self._downloads[number].set_result(download(self.files[number].url))
        except Exception as error:  # raised where the file is opened
            self._downloads[number].set_exception(error)


def unpack(raw: BinaryIO, packing: str) -> BinaryIO:
    """Return the decompressed stream of an open file, by its first bytes, else by its suffix.

    Raises:
        ImportError: There is no decompressor for it.
    """
    start = re.match(PACKED, raw.read(HEAD_BYTES))
    raw.seek(0)
    packing = f".{start.lastgroup}" if start else packing
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value] # is one in all but name
    if packing in DECOMPRESSORS:
        return io.BufferedReader(DecompressReader(raw, DECOMPRESSORS[packing]))  # type: ignore
    if packing == ".zst":
        raise ImportError(f".zst needs {ZSTD}. Fix: pip install -c constraints.txt {ZSTD}")
    return raw
