"""Find a text by its dotted name, in the objects of a JSON line and in the structs of a table."""

from typing import Any

from data.sources import name_first


def find_field(tree: Any, name: str) -> tuple[list[str], Any]:
    """Return the keys that lead to a name, none where it is not there, and the value.

    Args:
        tree: Objects in objects; anything else has no keys.
        name: "text", or "meta.text", where a key that holds the dot itself comes first.
    """
    if isinstance(tree, dict) and name in tree:
        return [name], tree[name]
    keys = name.split(".") if isinstance(tree, dict) else []
    for n in range(len(keys) - 1, 0, -1):
        head = ".".join(keys[:n])
        rest, value = find_field(tree.get(head), ".".join(keys[n:]))
        if rest:
            return [head, *rest], value
    return [], None


def name_fields(tree: Any) -> str:
    """Return the names of the values in objects, as `find_field` takes them, strings first."""
    found = [("", tree)]
    names: dict[bool, list[str]] = {True: [], False: []}  # of strings, of others
    for prefix, value in found:  # which grows meanwhile
        if isinstance(value, dict):
            found += [(f"{prefix}{key}.", inner) for key, inner in value.items()]
        else:  # repr escapes what would not be one line
            names[isinstance(value, str)].append(repr(prefix[:-1])[1:-1])
    return name_first(names[True] + names[False], at_most=20) or "it has none"
