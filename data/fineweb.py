"""Turn FineWeb-Edu into token shards: the files, names and sizes of build-nanogpt's `fineweb.py`.

    python data/fineweb.py                                        # sample-10BT -> edu_fineweb10B/
    python data/fineweb.py --name sample-100BT --out_dir /data/edu_fineweb100B
    python data/fineweb.py --name default                         # all of it
    mpirun -n 8 python data/fineweb.py

A preset of data/prepare.py. 100 shards of 100M tokens, shard 0 for validation; needs 28 GB of
download (none with --streaming) and 20 GB for the shards of sample-10BT.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from data.prepare import add_options, run

DATASET = "HuggingFaceFW/fineweb-edu"
OUT_DIRS = {
    "sample-10BT": "edu_fineweb10B",
    "sample-100BT": "edu_fineweb100B",
    "sample-350BT": "edu_fineweb350B",
    "default": "edu_fineweb",
}


def build_parser() -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--name", default="sample-10BT", help=f"{', '.join(OUT_DIRS)}, or one crawl, CC-MAIN-…")
    add("--dataset", default=DATASET, help="hub name, or a copy in a folder (default: %(default)s)")
    add("--revision", help="branch, tag or commit of the dataset (its main branch)")
    add("--out_dir", type=Path, help="folder for the shards (edu_fineweb10B and so on)")
    add_options(parser)
    parser.set_defaults(inputs=[], split="train")
    return parser


def main() -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args()
    args.out_dir = args.out_dir or Path(OUT_DIRS.get(args.name, f"edu_fineweb_{args.name}"))
    return run(args, "edufineweb")


if __name__ == "__main__":
    sys.exit(main())
