"""Parse a command line: the help shows the docstring as it is, an error takes one line."""

import argparse
import typing


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line what is wrong."""

    def __init__(self, **options: typing.Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> typing.NoReturn:
        """Print what is wrong and what to do, and exit with status 2."""
        self.exit(2, f"error: {message}. Fix: {self.prog} --help lists the flags\n")
