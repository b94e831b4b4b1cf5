"""Where a value lies in a document: `a`, `a.b`, `$.a.b[0].c`, `$['a.b']`."""

from __future__ import annotations

import re
from typing import Any, Final

from edgeward.errors import InvalidDocument

Path = tuple[str | int, ...]

MISSING: Final = object()

_STEP = re.compile(
    r"""\.?(?P<name>[^.\[\]]+)
      | \[(?P<index>-?\d{1,6})\]
      | \['(?P<single>[^']*)'\]
      | \["(?P<double>[^"]*)"\]""",
    re.VERBOSE,
)


def parse_path(text: str, field: str) -> Path:
    """The steps of a path, none for the empty text and for `$`. A name that holds a dot is quoted: `$['a.b']`.

    Raises InvalidDocument naming `field` when the text is no path.
    """
    rooted = text == "$" or text.startswith(("$.", "$["))
    rest = text[1:] if rooted else text
    steps: list[str | int] = []
    at = 0
    while at < len(rest):
        found = _STEP.match(rest, at)
        dotted = rest[at] == "."
        # A dot leads to a name and only to one; without a dot a name can only come first.
        if found is None or (found["name"] is not None and dotted == (at == 0 and not rooted)):
            raise InvalidDocument(
                f"not a path: {text!r}", field=field, hint="like a, a.b, $.a.b[0].c or $['a.b']"
            )
        if found["index"] is not None:
            steps.append(int(found["index"]))
        else:
            steps.append(
                next(found[kind] for kind in ("name", "single", "double") if found[kind] is not None)
            )
        at = found.end()
    return tuple(steps)


def lookup(document: Any, path: Path) -> Any:
    """The value at `path`, or MISSING."""
    for step in path:
        if isinstance(step, str):
            document = document.get(step, MISSING) if isinstance(document, dict) else MISSING
        elif isinstance(document, list) and -len(document) <= step < len(document):
            document = document[step]
        else:
            return MISSING
        if document is MISSING:
            return MISSING
    return document
