"""Read YAML so that whatever is wrong with it becomes one line with the place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from edgeward.errors import InvalidDocument

MAX_DEPTH = 64
MAX_BYTES = 8 << 20
MAX_VALUES = 1_000_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML is not: a key that stands twice in one mapping is refused (3.2.1.3), and `22:00` is
    a text, not a number of base 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            return node.value
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def read_text(path: Path) -> str:
    """Raises InvalidDocument naming the file."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidDocument(f"cannot read it: {error.strerror}", source=str(path)) from None
    except UnicodeDecodeError:
        raise InvalidDocument("not a text file in UTF-8", source=str(path)) from None
    if len(text) > MAX_BYTES:
        raise InvalidDocument(f"larger than {MAX_BYTES} characters", source=str(path))
    return text


def load_yaml(text: str, source: str) -> list[Any]:
    """All documents of a YAML text, empty ones left out.

    Raises InvalidDocument naming `source` and the line for bad syntax, and the field for a number that
    is not finite or a value that lies too deep or contains itself.
    """
    try:
        documents = [item for item in yaml.load_all(text, _Loader) if item is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InvalidDocument(f"not valid YAML: {problem}", source=where) from None
    except RecursionError:
        raise InvalidDocument("not valid YAML: nested too deeply", source=source) from None
    except ValueError as error:  # a date or number that its pattern allows and Python does not
        raise InvalidDocument(f"not valid YAML: {error}", source=source) from None
    for document in documents:
        _check_values(document, source)
    return documents


def _check_values(document: Any, source: str) -> None:
    sizes: dict[int, int] = {}

    def size(value: Any, field: str, depth: int) -> int:
        """The number of values, aliases written out; each shared value is walked once."""
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidDocument(f"expected a finite number, got {value}", source=source, field=field)
        if not isinstance(value, dict | list):
            return 1
        if depth > MAX_DEPTH:  # also what contains itself
            raise InvalidDocument("nested too deeply", source=source, field=field[:80])
        if id(value) not in sizes:
            if isinstance(value, dict):
                items = [(f"{field}.{key}".lstrip("."), inner) for key, inner in value.items()]
            else:
                items = [(f"{field}[{index}]", inner) for index, inner in enumerate(value)]
            total = 1 + sum(size(inner, name, depth + 1) for name, inner in items)
            if total > MAX_VALUES:
                raise InvalidDocument(
                    f"holds more than {MAX_VALUES} values once its aliases are written out",
                    source=source,
                    field=field[:80],
                )
            sizes[id(value)] = total
        return sizes[id(value)]

    size(document, "", 0)
