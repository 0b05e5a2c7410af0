"""Tell a file that is not what its name says, and name the command that makes it so."""

import re
from collections import Counter
from pathlib import Path
from shlex import quote

from data.fineweb import OUT_DIRS
from data.sources import HUB, KINDS, LINES, ROWS, TEXT, SourceFile, list_folder
from errors import BadInput

SKIP = "leave it out with --on_error skip"
FIX_OR_SKIP = f"correct it, or {SKIP}"
FINEWEB = Path(OUT_DIRS["sample-10BT"])  # the default of --data_dir
START = rb"(?:\s*\xef\xbb\xbf)?\s*(?:%b)"  # perhaps after a byte order mark and white space
UNPACK = {".gz": "gzip -dc", ".xz": "xz -dc", ".bz2": "bzip2 -dc", ".zst": "zstd --long=31 -dc"}
ANY = (TEXT, LINES, ROWS)
# By its name a file is of these kinds; how it begins; what it is then; what mends it.
FORMS = [
    (ANY, rb"version https?://(git-lfs|hawser)", "a Git LFS pointer, not the file", "git lfs pull"),
    (ANY, rb"[./]*(\.git)?/annex/objects/", "a git-annex pointer, not the file", "git annex get ."),
    ((TEXT, ROWS), rb"\x1f\x8b\x08", "a gzip file", "gzip -dc"),
    ((TEXT, LINES), rb"\xff\xfe|\xfe\xff|([\t-~]\0){2}", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    ((LINES, ROWS), rb"<", "an HTML or XML page", ""),
    ((LINES,), rb"\[\s*(\{|\Z)", "a JSON array, not one object per line", "jq -c '.[]'"),
    ((LINES,), rb'\[\s*"', "a JSON array of strings, not objects", "jq -c '.[] | {text: .}'"),
    ((LINES,), rb'\{([^\n]*[,{\[]\s*\n\s*"|\s*\n)', "JSON objects over several lines", "jq -c ."),
    ((LINES,), rb"\{[^\n]*?\}[ \t]*\r[^\S\n]*\{", "lines that end in \\r", r"tr '\r' '\n'"),
]  # fmt: skip


def refuse_other_forms(head: bytes, file: SourceFile) -> None:
    """Refuse a file that begins as another form of file does.

    Raises:
        BadInput: Says which, and what mends it.
    """
    for kinds, pattern, what, command in FORMS:
        if file.kind in kinds and re.match(START % pattern, head):
            remedy = mend(file, command) if command else "download the file itself, not its page"
            raise BadInput(file.url, what, f"{remedy}, or {SKIP}")


def mend(file: SourceFile, command: str) -> str:
    """Return what to type: how to get the file, or how to convert it and keep the old one."""
    if file.url.startswith(HUB):
        return "try the hub's own conversion, --revision refs/convert/parquet"
    if command.startswith("git"):
        return f"get the file with: cd {quote(str(Path(file.url).parent))} && {command}"
    old = quote(f"{file.url}.old")  # of no known kind: left out of a folder
    unpack = f"{UNPACK[file.packing]} < {old} | {command}" if file.packing else f"{command} < {old}"
    target = quote(file.url[: len(file.url) - len(file.packing)])
    return f"mv {quote(file.url)} {old} && {unpack} > {target}"


def not_utf8(where: str, file: SourceFile) -> BadInput:
    """Return the error for another encoding, which is most often that of Windows."""
    command = mend(file, "iconv -f WINDOWS-1252 -t UTF-8")
    return BadInput(where, "not UTF-8", f"if it is Windows-1252: {command}, or {SKIP}")


def how_to_get_shards(data_dir: Path) -> tuple[str, str]:
    """Say what a place without shards holds, if that is text, and what to type to get shards."""
    is_text = data_dir.is_file() and data_dir.suffix in KINDS
    texts = list_folder(data_dir)[0] if data_dir.is_dir() else [data_dir] * is_text
    place = quote(str(data_dir))
    if not texts:
        from_text = f"python data/prepare.py TEXT… --out_dir {place}"
        return "", "python data/fineweb.py" if data_dir == FINEWEB else from_text
    held = Counter(path.suffix.lower() for path in texts)
    n_bytes = sum(path.stat().st_size for path in texts)
    # Few files may be few documents, without a tenth; 1 % of the bytes are some 4 % of the tokens.
    split = "--val_every 10" if len(texts) >= 10 else f"--val_tokens {max(1, n_bytes // 100)}"
    out_dir = quote(f"{data_dir if data_dir.name else data_dir.absolute()}_tokens")
    make = f"python data/prepare.py {place} --out_dir {out_dir} {split}"
    what = f"; it holds {', '.join(f'{n} {suffix}' for suffix, n in held.most_common())}"
    return what, f"{make}, then --data_dir {out_dir}"
