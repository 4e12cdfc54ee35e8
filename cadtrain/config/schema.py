"""What a key path of the configuration means: its field, the type it expects in words, near spellings.

Works on any tree of pydantic models; the run configuration and the DeepSpeed mirror both use it, for
messages and for the generated documentation.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cadtrain.config.yaml_source import KeyPath, dotted
from cadtrain.units import Duration

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    Duration: "a duration such as `20 steps` or `1 epoch`",
    Any: "any value",
}


def key_of(name: str, field: FieldInfo) -> str:
    """The key a field is written with: its alias if it has one."""
    return field.alias or name


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of `model` by the key they are written with."""
    return {key_of(name, field): field for name, field in model.model_fields.items()}


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None` or `tuple[Model, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        return None
    for argument in get_args(annotation):
        found = section_in(argument)
        if found is not None:
            return found
    return None


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """The field that `path` names in `model`; list positions and keys of free mappings lead nowhere deeper."""
    field: FieldInfo | None = None
    current: type[BaseModel] | None = model
    for key in path:
        if isinstance(key, int):
            continue
        if current is None:
            return None
        field = fields_of(current).get(key)
        if field is None:
            return None
        current = section_in(field.annotation)
    return field


def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model whose keys stand at `path`."""
    if not [key for key in path if isinstance(key, str)]:
        return model
    field = field_at(model, path)
    return section_in(field.annotation) if field is not None else None


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number, at least 1, or null`."""
    return _phrase(field.annotation, list(field.metadata))


def _phrase(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _phrase(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        words = " or ".join(_phrase(option, metadata) for option in options)
        return f"{words}, or null" if len(options) < len(arguments) else words
    if origin is Literal:
        return "one of " + ", ".join(
            str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in arguments
        )
    if origin in (tuple, list):
        if origin is tuple and Ellipsis not in arguments:
            return f"a list of {len(arguments)} values, each {_phrase(arguments[0], metadata)}"
        return f"a list, each item {_phrase(arguments[0], [])}"
    if origin is dict:
        return f"a mapping from {_phrase(arguments[0], [])} to {_phrase(arguments[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with keys"
    return _NAMES.get(annotation, str(annotation)) + "".join(_bounds(metadata))


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        for attribute, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
            bound = getattr(item, attribute, None)
            if bound is not None:
                yield f", {words} {bound}"
        pattern = getattr(item, "pattern", None)
        if isinstance(pattern, str):
            yield f" matching {pattern}"


def all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path below `model`, sections before their contents; a list of sections counts as its position 0."""
    for key, field in fields_of(model).items():
        path = (*prefix, key)
        yield path
        inner = section_in(field.annotation)
        if inner is not None:
            listed = "tuple" in str(field.annotation) or "list" in str(field.annotation)
            yield from all_keys(inner, (*path, 0) if listed else path)


def unknown_key_hint(root: type[BaseModel], path: KeyPath) -> str:
    """What the writer of the unknown key `path` may have meant: a near spelling, or the section where the key lives."""
    key = str(path[-1])
    section = section_at(root, path[:-1])
    siblings = list(fields_of(section)) if section is not None else []
    near = difflib.get_close_matches(key.lower().replace("-", "_"), siblings, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`?"
    elsewhere = [dotted(known) for known in all_keys(root) if known[-1] == key]
    if elsewhere:
        return f"Did you mean `{'` or `'.join(elsewhere[:3])}`?"
    far = difflib.get_close_matches(key.lower(), sorted({str(known[-1]) for known in all_keys(root)}), n=1, cutoff=0.8)
    if far:
        places = [dotted(known) for known in all_keys(root) if known[-1] == far[0]]
        return f"Did you mean `{places[0]}`?"
    return f"Known here: {', '.join(siblings)}." if siblings else ""
