"""Pydantic's errors as faults with a place, the value found, what was expected, and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from cadtrain.config.schema import expected, field_at, fields_of, section_at, unknown_key_hint
from cadtrain.config.section import SectionFaults
from cadtrain.config.yaml_source import KeyPath
from cadtrain.errors import Fault

Where = Callable[[KeyPath], str]
"""Gives the place of a key path: `file:line key.path`."""

_LONGEST_SHOWN = 60


def collect_faults(model: type[BaseModel], values: dict[str, Any], error: ValidationError, where: Where) -> list[Fault]:
    """All faults of `values` for `model`, in the order of their keys in the document.

    Pydantic checks what stands between sections only when each section is sound. So the faulty keys are taken
    out and the rest is checked again, until nothing new is found; a fault that depends on a key taken out is dropped.
    """
    found: dict[KeyPath, Fault] = {}
    removed: set[KeyPath] = set()
    values = _copy(values)
    while True:
        fresh = [entry for entry in _expand(model, error, where) if not _depends(entry[1], removed)]
        fresh = [entry for entry in fresh if entry[0] not in found]
        for path, _, fault in fresh:
            found[path] = fault
        paths = {path for path, _, _ in fresh}
        if not any([_remove(model, values, path) for path in paths]):  # a list: every one of them is taken out
            return list(found.values())
        removed |= paths
        try:
            model.model_validate(values)
        except ValidationError as next_error:
            error = next_error
        else:
            return list(found.values())


def show_value(value: Any) -> str:
    """A value as it would be written in YAML, shortened."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, dict | list | tuple):
        text = f"a {'mapping' if isinstance(value, dict) else 'list'} ({value})"
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def _expand(
    model: type[BaseModel], error: ValidationError, where: Where
) -> Iterable[tuple[KeyPath, list[KeyPath], Fault]]:
    """(path, paths it depends on, fault) for each error."""
    for detail in error.errors(include_url=False):
        path = tuple(key for key in detail["loc"] if key != "[key]")
        raised = detail.get("ctx", {}).get("error")
        if detail["type"] == "too_short" and detail["input"]:
            continue  # it has items; pydantic does not count faulty ones, and these are told by themselves
        if isinstance(raised, SectionFaults):
            for inner in raised.faults:
                place = (*path, *inner.path)
                yield (
                    place,
                    [place, *((*path, *other) for other in inner.also)],
                    Fault(where(place), inner.message, inner.hint),
                )
        else:
            yield path, [path], _fault(model, path, detail, where)


def _fault(model: type[BaseModel], path: KeyPath, detail: Any, where: Where) -> Fault:
    kind, found = detail["type"], detail["input"]
    field = field_at(model, path)
    if kind == "extra_forbidden":
        return Fault(where(path), "unknown key.", unknown_key_hint(model, path))
    if kind == "missing" and isinstance(path[-1], int):
        return _fault(model, path[:-1], {**detail, "type": "wrong_length", "loc": path[:-1]}, where)
    if kind == "missing":
        wanted = f"expected {expected(field)}." if field is not None else ""
        return Fault(where(path), f"missing; {wanted}", (field.description or "") if field is not None else "")
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return Fault(where(path), message if message.endswith((".", "`")) else f"{message}.")
    if kind == "too_short":
        return Fault(
            where(path), "found none, expected at least one.", (field.description or "") if field is not None else ""
        )
    if (
        field is None
        or "[key]" in detail["loc"]
        or isinstance(path[-1], int)
        or path[-1] not in _written_keys(model, path)
    ):
        return Fault(where(path), f"found {show_value(found)}. {detail['msg'][:1].upper()}{detail['msg'][1:]}.")
    return Fault(where(path), f"found {show_value(found)}, expected {expected(field)}.", field.description or "")


def _written_keys(model: type[BaseModel], path: KeyPath) -> set[str]:
    section = section_at(model, path[:-1])
    return set(fields_of(section)) if section is not None else set()


def _depends(paths: list[KeyPath], removed: set[KeyPath]) -> bool:
    """Whether one of `paths` is, holds, or lies under a key that was taken out."""
    return any(path[: len(gone)] == gone or gone[: len(path)] == path for path in paths for gone in removed)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _remove(model: type[BaseModel], values: Any, path: KeyPath) -> bool:
    """Take the value at `path` out, or put the field's example there if it is required; False where there is none."""
    for key in path[:-1]:
        inside = key in values if isinstance(values, dict) else isinstance(key, int) and key < len(values)
        if not inside or not isinstance(values[key], dict | list):
            return False
        values = values[key]
    if not path or not isinstance(values, dict) or path[-1] not in values:
        return False
    field = field_at(model, path)
    if field is not None and field.is_required() and field.examples and path[-1] in _written_keys(model, path):
        values[path[-1]] = _copy(field.examples[0])
    else:
        del values[path[-1]]
    return True
