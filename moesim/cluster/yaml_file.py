"""Reading YAML that a stranger may have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moesim.errors import FormatError, InputError
from moesim.known_text import known_text

MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_NODES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _refuse(event, f"nested more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _refuse(key, f"key {key.value!r} appears twice")
                seen.add(key.value)
        return node


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes of the tree under `node`, every alias counted in full.

    A few lines of aliases of aliases can stand for gigabytes; refuses more than _MAX_NODES, and a
    node that contains itself. `sizes` remembers what was counted.
    """
    if id(node) not in sizes:
        sizes[id(node)] = _MAX_NODES
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
        if sizes[id(node)] > _MAX_NODES:
            raise _refuse(node, f"aliases expand to more than {_MAX_NODES} values")
    return sizes[id(node)]


def _refuse(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def read_yaml(path: Path, label: str) -> tuple[dict[str, Any], yaml.Node]:
    """Parse `path` as one YAML mapping; `label` names the file in errors.

    Returns the mapping and its node tree (for `line_of`). Only plain YAML types are made: tags
    such as `!!python/object` are refused, as are duplicate keys, files over MAX_BYTES, aliases that
    expand to more than 100,000 values and nesting deeper than 20. Raises InputError when the file
    cannot be read, FormatError otherwise.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"cannot read {label}: {reason}", "check the path and its permissions"
        ) from None
    if len(data) > MAX_BYTES:
        raise FormatError(
            f"{label}: larger than {MAX_BYTES} bytes", "a cluster file is a few hundred lines"
        )
    try:
        text = data.decode("utf-8")
        if (found := known_text(text[: 1 << 14])) is not None:
            raise FormatError(f"{label}: is {found[0]}, not a cluster or calibration", found[1])
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _expanded_size(node, {})
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise FormatError(f"{label}: not UTF-8 text", "save the file as UTF-8 YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise FormatError(
            f"{label}{where}: not valid YAML here: {error.problem or error.context}",
            "write plain YAML: no tags or repeated keys, one document",
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{label}: not valid YAML: {str(error)[:200]}", "write plain YAML text"
        ) from None
    if not isinstance(content, dict) or node is None:
        raise FormatError(
            f"{label}: the top level is {_type_name(content)}, not a mapping",
            "start from a file printed by `moesim topology show NAME --yaml`",
        )
    return content, node


def line_of(root: yaml.Node, loc: Sequence[str | int]) -> tuple[int, list[str | int]]:
    """Line number (from 1) of the deepest part of `loc` that exists, and `loc` without the parts
    that name no key or item (pydantic's union members)."""
    node, kept = root, []
    line = root.start_mark.line + 1
    for i, part in enumerate(loc):
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                    child, line = value, key.start_mark.line + 1
                    break
        elif (
            isinstance(node, yaml.SequenceNode)
            and isinstance(part, int)
            and 0 <= part < len(node.value)
        ):
            child = node.value[part]
            line = child.start_mark.line + 1
        if child is None:
            if isinstance(node, yaml.MappingNode) and i == len(loc) - 1:
                kept.append(part)
            continue
        kept.append(part)
        node = child
    return line, kept


def _type_name(value: Any) -> str:
    return {type(None): "empty", list: "a list", str: "text"}.get(type(value), "a scalar")
