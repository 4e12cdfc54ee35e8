"""YAML text to plain values, with the line of every key; all duplicate keys and odd tags are found in one reading.

The document is composed into nodes and the nodes are turned into values here, because a constructed
document forgets its lines and stops at the first duplicate.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from cadtrain.errors import ConfigError, Fault

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of a document to a value."""

MERGE_KEY = "<<"


def dotted(path: KeyPath) -> str:
    """`("curriculum", 0, "name")` -> `curriculum.0.name`."""
    return ".".join(map(str, path))


@dataclass
class Document:
    """The values of one YAML document, the line of each of its keys (1-based), and the faults of its form."""

    name: str
    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, path: KeyPath, line: int | None = None) -> str:
        """`file:line key.path` of the nearest written key at or above `path`."""
        written = path
        while line is None and written not in self.lines and written:
            written = written[:-1]
        line = self.lines.get(written, 1) if line is None else line
        return f"{self.name}:{line} {dotted(path)}".rstrip()


def read_yaml(text: str, name: str) -> Document:
    """Read one document; a text that is no YAML at all raises `ConfigError` with the line shown."""
    yaml = YAML(typ="safe", pure=True)
    document = Document(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it: the newer anchor holds
            root = yaml.compose(text)
        if root is not None:
            document.values = _Reader(yaml, document).value(root, ())
    except MarkedYAMLError as error:
        raise ConfigError([_syntax_fault(error, text, name)]) from error
    except YAMLError as error:
        raise ConfigError([Fault(name, f"not readable as YAML: {error}".splitlines()[0])]) from error
    return document


class _Reader:
    """Walks the nodes of one document."""

    def __init__(self, yaml: YAML, document: Document) -> None:
        self._yaml = yaml
        self._document = document
        self._open: list[int] = []

    def value(self, node: Node, path: KeyPath) -> Any:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            self._fault(node, path, "an alias that contains itself.", "Write the value out.")
            return None
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            assert isinstance(node, SequenceNode)
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        finally:
            self._open.pop()

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        try:
            return self._yaml.constructor.construct_object(node)
        except (MarkedYAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or str(error)
            self._fault(node, path, f"{node.value!r} cannot be read: {problem}.", "Put it in quotes or remove the tag.")
            return None

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if key is None or key == MERGE_KEY:
                what = (
                    "a merge key (`<<`) is not read here." if key else "a key must be a word, not a list or a mapping."
                )
                self._fault(key_node, path, what, "Write the keys out." if key else "")
                continue
            here = (*path, key)
            if key in values:
                self._fault(key_node, here, f"written twice, first on line {self._document.lines[here]}.", "Keep one.")
                continue
            self._document.lines[here] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, here)
        return values

    def _fault(self, node: Node, path: KeyPath, message: str, hint: str = "") -> None:
        self._document.faults.append(Fault(self._document.where(path, node.start_mark.line + 1), message, hint))


def _syntax_fault(error: MarkedYAMLError, text: str, name: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or error.context or "not readable as YAML").strip()
    if mark is None:
        return Fault(name, f"{problem}.")
    lines = text.splitlines() or [""]
    number = min(mark.line, len(lines) - 1)
    label = f"{number + 1} | "
    shown = f"{label}{lines[number]}".replace("\t", "→")
    pointer = " " * (len(label) + min(mark.column, len(lines[number]))) + "^"
    hint = " Indent with spaces, not with tabs." if "\t" in lines[number][: mark.column + 1] else ""
    return Fault(f"{name}:{number + 1}", f"not readable as YAML: {problem}.{hint}\n    {shown}\n    {pointer}")
