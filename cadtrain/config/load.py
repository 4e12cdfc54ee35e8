"""Load a run's configuration: a YAML file or a preset, overrides on top, every fault at once.

Loading only reads. Relative paths inside a configuration (`data.path`, `zero.config_file`, a local `pretrained`
folder) are kept as written and are taken from the working directory, like paths on the command line.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from cadtrain.config.faults import collect_faults, show_value
from cadtrain.config.overrides import Overlay
from cadtrain.config.sections import RunConfig
from cadtrain.config.yaml_source import KeyPath, read_yaml
from cadtrain.errors import ConfigError, Fault, UsageError

DEFAULT_PRESET = "demo"
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and where it came from."""

    config: RunConfig
    source: str
    """Path of the file as given, or `preset NAME`."""
    overrides: tuple[str, ...] = ()
    """The `--set` assignments that were laid over it, in order."""
    _where: Callable[[KeyPath], str] = field(default=lambda path: "", repr=False, compare=False)
    _origin: Callable[[KeyPath], str] = field(default=lambda path: "", repr=False, compare=False)

    def where(self, key: str) -> str:
        """The place of a key such as `data.path`, for messages: `run.yaml:12 data.path` or `--set data.path`."""
        return self._where(tuple(int(word) if word.isdigit() else word for word in key.split(".")))


    def origin(self, path: KeyPath) -> str:
        """Where exactly this key was written: `run.yaml:12`, `--set`, or nothing where its value is a default."""
        return self._origin(path)


def load_run_config(source: Path | str | None = None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load and check a configuration.

    `source` is a YAML path, the name of a preset, or None for the preset `demo`. A bare word that names a preset
    is the preset; write `./name` for a file of that name. `overrides` are `key.path=value` texts whose values are
    read as YAML; a stage is named by its position or its name (`curriculum.0.duration=20`).

    Raises `UsageError` when there is no such file and `ConfigError` with every fault found.
    """
    name, text = _read_source(DEFAULT_PRESET if source is None else source)
    document = read_yaml(text, name)
    if not isinstance(document.values, dict):
        raise ConfigError([*document.faults, _not_a_mapping(name, document.values)])
    overlay = Overlay(document)
    overlay.apply(overrides)
    faults = list(overlay.faults)
    config = None
    try:
        config = RunConfig.model_validate(overlay.values)
    except ValidationError as error:
        faults.extend(collect_faults(RunConfig, overlay.values, error, overlay.where))
    if faults or config is None:
        raise ConfigError(sorted(faults, key=_place_order))
    return LoadedConfig(config, name, tuple(overrides), overlay.where, overlay.origin)


def to_yaml(config: RunConfig) -> str:
    """The complete configuration, defaults included, as YAML that loads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(values: Any) -> str:
    """Plain values, or ruamel's with their comments, as YAML in the form of our files."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def preset_names() -> tuple[str, ...]:
    """Names of the presets in the package, `demo` first."""
    names = [item.name.removesuffix(".yaml") for item in _presets().iterdir() if item.name.endswith(".yaml")]
    return tuple(sorted(names, key=lambda name: (name != DEFAULT_PRESET, name)))


def read_preset(name: str) -> str:
    """The commented text of a preset; raises `UsageError` for an unknown name."""
    if name not in preset_names():
        raise UsageError(f"no preset is called {name!r}.", hint=f"Presets: {', '.join(preset_names())}.")
    return (_presets() / f"{name}.yaml").read_text(encoding="utf-8")


def _presets() -> resources.abc.Traversable:
    return resources.files("cadtrain.config") / "presets"


def _read_source(source: Path | str) -> tuple[str, str]:
    """(name for messages, text) of a preset or a file."""
    if isinstance(source, str) and source in preset_names():
        return f"preset {source}", read_preset(source)
    path = Path(source)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"Its configuration is {inside}." if inside.is_file() else "Give a YAML file or a preset."
        raise UsageError("is a folder, not a configuration file.", where=str(source), hint=hint)
    try:
        return str(source), path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError("no such configuration file or preset.", where=str(source), hint=_nearby(path)) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not a text file in UTF-8 (byte {error.start}).", where=str(source), hint="Give a YAML file."
        ) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}.", where=str(source)) from error


def _nearby(path: Path) -> str:
    """Which file or preset may have been meant."""
    files: list[Path] = []
    for folder in {path.parent, path.parent / "configs"}:
        if folder.is_dir():
            files += [file for file in sorted(folder.iterdir()) if file.suffix in YAML_SUFFIXES]
    near_stems = difflib.get_close_matches(path.stem, [file.stem for file in files], n=3, cutoff=0.6)
    near = [str(file) for stem in near_stems for file in files if file.stem == stem]
    near += difflib.get_close_matches(path.stem, preset_names(), n=1, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(f'`{item}`' for item in dict.fromkeys(near))}?"
    return f"Presets: {', '.join(preset_names())}."


def _not_a_mapping(name: str, values: object) -> Fault:
    hint = "Start from a preset: `cadtrain train demo`, or copy one of configs/*.yaml."
    if values is None:
        return Fault(name, "the file is empty.", hint)
    return Fault(f"{name}:1", f"found {show_value(values)}, expected keys such as `model:` and `curriculum:`.", hint)


def _place_order(fault: Fault) -> tuple[int, int]:
    """File faults by line, then those of `--set` as given."""
    place = fault.where.split(" ")[0] if not fault.where.startswith("preset ") else fault.where.split(" ")[1]
    line = place.rpartition(":")[2]
    return (0, int(line)) if line.isdigit() else (1, 0)
