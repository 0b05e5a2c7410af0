"""Source files, open: as they are stored, downloaded or streamed, and unpacked."""

import bz2
import gzip
import hashlib
import io
import lzma
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

try:  # what LZMAFile and BZ2File read with: they end in silence before data that is damaged
    from _compression import DecompressReader  # type: ignore
except ImportError:  # Python 3.14
    from compression._common._streams import DecompressReader  # type: ignore

from data.sources import HUB, SourceFile, split_url

STREAMS: dict[str, Any] = {".xz": lzma.LZMADecompressor, ".bz2": bz2.BZ2Decompressor}
BUFFER_BYTES = 2**20
READ_AHEAD_BYTES = 2**23  # of a file that is streamed from the hub


def download(url: str) -> Path:
    """Download one file of a hub dataset into the hub's cache and check it.

    Raises:
        OSError: The network fails, or the file does not have the checksum that the hub states and
            is deleted.
    """
    from huggingface_hub import hf_hub_download

    repo, commit, name = split_url(url)
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
    if packing in STREAMS:
        return io.BufferedReader(DecompressReader(raw, STREAMS[packing]))  # type: ignore
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # type: ignore
    return raw
