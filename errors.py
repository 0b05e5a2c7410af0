"""The one error for what a user gave, and the one line in which commands print what went wrong."""

import re

from exit_status import BAD_INPUT, FAILED

# What compilers and linkers write, as FILE:LINE:COLUMN: fatal error: …; not "CUDA error: …".
COMPILER_ERROR = ": (fatal )?error: |cannot find -l"
# Words of the machine's failures, and what to do about them.
REMEDIES = (
    (r"Python\.h", "install Python's headers, e.g. apt install python3-dev"),
    ("libaio|-laio", "apt install libaio-dev (dnf: libaio-devel)"),
    ("No space left|Disk quota", "free disk space there, or give another folder"),
    ("No usable temporary directory", "export TMPDIR=FOLDER, one that is writable and not full"),
    ("Permission denied|not permitted", "give this user access (chmod, chown), or give another"),
    ("Read-only file system", "give one that is writable"),
    ("Too many open files", "ulimit -n 65536, then start again"),
    ("surrogates not allowed", "export LC_ALL=C.UTF-8"),
    (COMPILER_ERROR, "install or repair g++, or name another in CXX"),
)
MACHINE_ERROR = re.compile(f"{COMPILER_ERROR}|No space left|surrogates not allowed")


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
        self.others: list[BadInput] = []  # what else is wrong, a line for each

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}. Fix: {self.remedy}"
        return "\nerror: ".join([line, *map(str, self.others)])


class Complaints:
    """Collects what is wrong in several `with` blocks, so that all of it is said at once."""

    def __init__(self) -> None:
        self.found: list[BadInput] = []

    def __enter__(self) -> None:
        """Begin a block, which ends at what is wrong in it."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        """Keep what is wrong; any other error goes on."""
        if not isinstance(error, BadInput):
            return False
        self.found.append(error)
        return True

    def raise_all(self) -> None:
        """Raise what was found, if anything.

        Raises:
            BadInput: The first, with the others.
        """
        if self.found:
            first, *first.others = self.found
            raise first


def exit_status_of(error: Exception) -> int:
    """Return the exit status of an error; a ValueError of a library is not the user's."""
    return BAD_INPUT if isinstance(error, BadInput) else FAILED


def error_line(error: Exception) -> str:
    """Return `where: what. Fix: remedy` of an error, or of the failure that caused it."""
    first = str(error).partition("\n")[0]
    if isinstance(error, BadInput):
        return str(error)
    if "Fix: " in first:
        return first
    causes = _causes(error)
    lines = [line.strip() for cause in causes for line in str(cause).splitlines()]
    found = [line for line in lines if MACHINE_ERROR.search(line)]
    of_files = [cause for cause in causes if isinstance(cause, OSError) and cause.errno]
    found = [f"{each.filename or 'this machine'}: {each.strerror}" for each in of_files] or found
    if found:
        return f"{found[0]}. Fix: {remedy_of(found[0], 'correct that, then start again')}"
    first = str(causes[-1]).partition("\n")[0]
    return f"{type(causes[-1]).__name__}: {first}. Fix: see the traceback, --debug"


def remedy_of(line: str, otherwise: str) -> str:
    """Return what to do about a failure of the machine, by the words of its error."""
    return next((remedy for words, remedy in REMEDIES if re.search(words, line)), otherwise)


def _causes(error: BaseException) -> list[BaseException]:
    # `raise … from` keeps the cause; torch.compile's errors keep it under a name of their own.
    cause = error.__cause__ or getattr(error, "inner_exception", None)
    return [error, *(_causes(cause) if cause else [])]
