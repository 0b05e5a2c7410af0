"""The one error for what a user gave: every room raises it, and commands print it as one line."""


class BadInput(ValueError):  # noqa: N818  # reads as what it is
    """What the user gave cannot be used.

    Args:
        where: The flag with its value, the file, or the variable: `--seq_len 2048`.
        what: What is wrong, and what was expected: `gpt2 has a block size of 1024`.
        remedy: What to do about it: `give at most 1024`.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)  # so that it can be sent to another process
        self.where, self.what, self.remedy = where, what, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Fix: {self.remedy}"
