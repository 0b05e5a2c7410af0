"""Refuse passwords and access tokens, which a run would store in plain text in its folder."""

import re
from typing import Any

from errors import BadInput

# A token of Hugging Face, GitHub, OpenAI, Weights & Biases' or Amazon's; a URL with a password.
LOOKS_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16}|://[^/\s]+:[^/\s]+@"
)
NAMED_SECRET = re.compile(r"token$|secret|password|passwd|api_?key", re.IGNORECASE)


def refuse_credentials(values: dict[str, Any], where: str) -> None:
    """Refuse configuration that holds a credential: it is stored, also in every checkpoint.

    Args:
        values: A JSON object.
        where: What the error puts before a key: "--" or a file.

    Raises:
        BadInput: Names the key, not the value.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            refuse_credentials(value, f"{where}{key}.")
        elif isinstance(value, str) and (LOOKS_SECRET.search(value) or NAMED_SECRET.search(key)):
            what = "looks like a password or an access token, which would be stored"
            raise BadInput(f"{where}{key}", what, "give it in the environment (HF_TOKEN)")
