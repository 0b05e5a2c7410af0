"""Find the folder of a Hugging Face model: a local one, or a download from the hub."""

import hashlib
from pathlib import Path

from errors import BadInput

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def locate_hf_folder(name: str) -> Path:
    """Return the folder that `name` is: a local path, or a hub name, which is downloaded.

    A download takes `config.json` and the safetensors files or, without any, PyTorch's; each is
    checked against the SHA-256 that the hub states for it.

    Raises:
        BadInput: No such folder and no such model on the hub, or a wrong checksum.
    """
    if Path(name).is_dir():
        return Path(name)
    repo = f"openai-community/{name}" if name in HUB_NAMES else name
    is_local = name not in HUB_NAMES and Path(name).parent.is_dir()  # runs/x, where runs/ exists
    if is_local or repo.count("/") != 1 or repo.startswith((".", "/")):
        remedy = f"give a folder or a name on the hub ({', '.join(HUB_NAMES)}, owner/name)"
        raise BadInput(name, "no such folder", remedy)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=["config.json", "*.safetensors*"]))
        if not any(folder.glob("*.safetensors")):  # a model of before these files
            snapshot_download(repo, allow_patterns=["config.json", "pytorch_model*.bin*"])
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        what = f"is not a local folder, and the hub could not provide it ({reason})"
        raise BadInput(name, what, "give a folder") from error
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        blob = file.resolve()  # the hub's cache names a large file by the SHA-256 that it states
        with blob.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != blob.name:
            file.unlink()
            blob.unlink()
            raise BadInput(repo, f"{file.name} does not have the hub's SHA-256", "try again")
    return folder
