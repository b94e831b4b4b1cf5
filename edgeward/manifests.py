"""Read resources from YAML files and folders, saying which file and field is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeward.documents import load_yaml, read_text
from edgeward.errors import InvalidDocument
from edgeward.wire.resources import APPLICABLE, Resource, parse_resource

SUFFIXES = (".yaml", ".yml", ".json")


def read_resources(paths: list[Path]) -> list[Resource]:
    """All resources of the given files, folders (recursively) or `-` for standard input.

    Ordered so that what is referred to comes first. Raises InvalidDocument.
    """
    return [resource for _, resource in read_named(paths)]


def read_named(paths: list[Path]) -> list[tuple[str, Resource]]:
    """Like `read_resources`, each with the name of the file, and document in it, that it stands in."""
    found: list[tuple[str, Resource]] = []
    for path in paths:
        if str(path) == "-":
            found += _parse(sys.stdin.read(), "standard input")
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not files:
                raise InvalidDocument("holds no .yaml, .yml or .json file", source=str(path))
            for file in files:
                found += _parse(read_text(file), str(file))
        else:
            found += _parse(read_text(path), str(path))
    seen: dict[tuple[str, str], str] = {}
    for source, resource in found:
        key = (resource.kind, resource.metadata.name)
        if key in seen:
            raise InvalidDocument(
                f"{key[0]} {key[1]} stands in {seen[key]} already", source=source, field="metadata.name"
            )
        seen[key] = source
    return sorted(found, key=lambda item: APPLICABLE.index(item[1].kind))


def _parse(text: str, source: str) -> list[tuple[str, Resource]]:
    documents = load_yaml(text, source)
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
