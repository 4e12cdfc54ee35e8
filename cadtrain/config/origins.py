"""The effective configuration as YAML, each value with the place that it came from."""

from __future__ import annotations

from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from cadtrain.config.load import LoadedConfig, dump_yaml
from cadtrain.config.section import Section
from cadtrain.config.yaml_source import KeyPath

DEFAULT = "default"


def annotated_yaml(loaded: LoadedConfig) -> str:
    """`to_yaml` with a comment behind each value: its file and line, `--set`, or `default`. It loads back equal."""
    values = loaded.config.model_dump(mode="json")
    return dump_yaml(_mapping(values, loaded.config, (), loaded, ""))


def _mapping(values: dict[str, Any], section: Any, path: KeyPath, loaded: LoadedConfig, above: str) -> CommentedMap:
    """`section` is the model that `values` were dumped from, or a plain dict, whose keys stand where it stands (`above`)."""
    found = CommentedMap()
    for key, value in values.items():
        here = (*path, key)
        held = getattr(section, key) if isinstance(section, Section) else None
        origin = loaded.origin(here) or (above if not isinstance(section, Section) else "") or DEFAULT
        if isinstance(value, dict) and value:
            found[key] = _mapping(value, held, here, loaded, origin)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rows = (_mapping(row, held[i] if held else None, (*here, i), loaded, origin) for i, row in enumerate(value))
            found[key] = CommentedSeq(rows)
        else:
            found[key] = value
            if isinstance(value, list):
                found[key] = CommentedSeq(value)
                found[key].fa.set_flow_style()
            found.yaml_add_eol_comment(origin, key)
    return found
