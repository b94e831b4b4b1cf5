"""Read resources from YAML files and folders, saying which file and field is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from edgeward.errors import InvalidDocument
from edgeward.wire.resources import APPLICABLE, Resource, parse_resource

SUFFIXES = (".yaml", ".yml", ".json")


def read_resources(paths: list[Path]) -> list[Resource]:
    """All resources of the given files, folders (recursively) or `-` for standard input.

    Ordered so that what is referred to comes first. Raises InvalidDocument.
    """
    found: list[tuple[str, Resource]] = []
    for path in paths:
        if str(path) == "-":
            found += _parse(sys.stdin.read(), "standard input")
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not files:
                raise InvalidDocument("holds no .yaml, .yml or .json file", source=str(path))
            for file in files:
                found += _parse(_read(file), str(file))
        else:
            found += _parse(_read(path), str(path))
    seen: dict[tuple[str, str], str] = {}
    for source, resource in found:
        key = (resource.kind, resource.metadata.name)
        if key in seen:
            raise InvalidDocument(
                f"{key[0]} {key[1]} stands in {seen[key]} already", source=source, field="metadata.name"
            )
        seen[key] = source
    return sorted((resource for _, resource in found), key=lambda item: APPLICABLE.index(item.kind))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidDocument(f"cannot read it: {error.strerror}", source=str(path)) from None
    except UnicodeDecodeError:
        raise InvalidDocument("not a text file in UTF-8", source=str(path)) from None


def _parse(text: str, source: str) -> list[tuple[str, Resource]]:
    try:
        documents: list[Any] = [item for item in yaml.safe_load_all(text) if item is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise InvalidDocument(
            f"not valid YAML: {getattr(error, 'problem', None) or error}", source=where
        ) from None
    if not documents:
        raise InvalidDocument("holds no document", source=source)
    resources = []
    for index, document in enumerate(documents):
        label = source if len(documents) == 1 else f"{source} (document {index + 1})"
        resource = parse_resource(document, source=label)
        if resource.kind not in APPLICABLE:
            raise InvalidDocument(
                f"a {resource.kind} cannot be applied",
                source=label,
                field="kind",
                hint="publish a signed package instead: `edgeward publish`",
            )
        resources.append((label, resource))
    return resources
