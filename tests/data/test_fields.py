"""The text by its dotted name, in JSON lines as in tables; a wrong name is answered with all."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data.fields import find_field, name_fields
from tests.prepared import expected, run, tokens

TEXTS = ["first document, of several words ", "second and more of it ", "third"]


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_of(text: str) -> dict[str, Any]:
    return {
        "id": 1,
        "meta": {"text": text, "deep": {"er": text, "a.b": text}, "lang": "en"},
        "a.b": {"c": text},
        "both.text": text,
        "both": {"text": "not this", "n": 1},
        "parts": [text],
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    "column", ["meta.text", "meta.deep.er", "meta.deep.a.b", "a.b.c", "both.text"]
)
def test_dotted_names_reach_into_objects(tmp_path: Path, name: str, column: str) -> None:
    path = write(tmp_path / name, [records_of(text) for text in TEXTS])
    run(path, "--out_dir", tmp_path / "out", "--text_column", column)
    assert tokens(tmp_path / "out") == expected(TEXTS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_wrong_name_is_answered_with_those_that_are_there(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [records_of(text) for text in TEXTS])
    for column, what in [
        ("text", 'no "text"|no column "text"'),
        ("meta.body", 'no "meta.body"|no column "meta.body"'),
        ("meta", '"meta" is (dict|a struct)'),
        ("parts", '"parts" is list'),
        ("id", '"id" is int'),
        ("id.x", 'no "id.x"|no column "id.x"'),
    ]:
        with pytest.raises(ValueError, match=what) as caught:
            run(path, "--out_dir", tmp_path / "out", "--text_column", column)
        said = str(caught.value)
        strings = "both.text, meta.text, meta.lang, a.b.c, both.text, meta.deep.er, meta.deep.a.b"
        assert f"{strings}, id, parts, both.n" in said
        assert "with --text_column" in said
        assert len(said.splitlines()) == 1


def test_an_object_that_is_null_has_no_text(tmp_path: Path) -> None:
    records = [{"m": {"t": TEXTS[0]}}, {"m": None}, {"m": {"t": None}}, {"m": {"t": TEXTS[1]}}]
    for name, bad in [
        ("a.jsonl", {'no "m.t" in this line': 1, '"m.t" is null, not a string': 1}),
        ("a.parquet", {'"m.t" is null, not a string': 2}),
    ]:
        path = write(tmp_path / name, records)
        options = (path, "--out_dir", tmp_path / f"{name} out", "--text_column", "m.t")
        with pytest.raises(ValueError, match="2: "):
            run(*options)
        assert run(*options, "--on_error", "skip").bad == bad
        assert tokens(tmp_path / f"{name} out") == expected(TEXTS[:2])


def test_categories_and_views_in_structs_are_read(tmp_path: Path) -> None:
    kinds = [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.large_string()]
    for i, kind in enumerate([*kinds, pyarrow.string_view(), pyarrow.binary()]):
        texts = pyarrow.array(TEXTS).cast(kind)
        table = pyarrow.table({"m": pyarrow.StructArray.from_arrays([texts], ["t"])})
        parquet.write_table(table, tmp_path / f"{i}.parquet")
        out = tmp_path / f"out{i}"
        run(tmp_path / f"{i}.parquet", "--out_dir", out, "--text_column", "m.t")
        assert tokens(out) == expected(TEXTS)


def test_the_names_of_fields_are_one_short_line() -> None:
    tree: Any = {"a\nb": "x", "n": 1, "empty": {}, "\ud800": "x"}
    assert name_fields(tree) == "a\\nb, \\ud800, n"
    many = name_fields({str(i): "x" for i in range(10**5)})
    assert many.startswith("0, 1, 2, ")
    assert len(many) < 200
    for _ in range(5000):
        tree = {"a": tree}
    assert name_fields(tree)
    assert [name_fields(value) for value in ({}, [], "x", None)] == ["it has none"] * 4


def test_the_longest_key_comes_first() -> None:
    tree = {"a": {"b": {"c": 1}, "b.c": 2}, "a.b": {"c": 3}}
    assert find_field(tree, "a.b.c") == (["a.b", "c"], 3)
    assert find_field(tree | {"a.b.c": 4}, "a.b.c") == (["a.b.c"], 4)
    assert find_field(tree | {"a.b": {}}, "a.b.c") == (["a", "b.c"], 2)
    assert find_field(tree, "a.x") == ([], None)
    assert find_field(["a"], "a") == ([], None)
