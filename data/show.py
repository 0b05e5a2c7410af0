"""Show what a folder of shards holds; or which documents were in one optimizer step of a run.

    python data/show.py DIR
    python data/show.py DIR --step 1234 --config runs/x/config.json

Every token is read and every SHA-256 of `shards.json` compared; a difference is exit status 1.
"""

import io
import signal
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput, error_line, exit_status_of
from exit_status import FAILED, FINISHED


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data_dir", type=Path, help="folder of token shards")
    parser.add_argument("--step", type=int, help="optimizer update, counted from 0 as in log.txt")
    parser.add_argument("--config", type=Path, help="config.json of the run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # in a locale without these letters
    # Not at the top: --help and a wrong flag do not wait for numpy and tiktoken.
    from data.contents import show_folder, show_step

    try:
        if (args.step is None) != (args.config is None):
            raise BadInput("--step and --config", "belong together", "give both or neither")
        if args.step is None:
            return FINISHED if show_folder(args.data_dir, args.quiet) else FAILED
        show_step(args.data_dir, args.step, args.config)
        return FINISHED
    except (BadInput, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return exit_status_of(error)


if __name__ == "__main__":
    sys.exit(main())
