"""`docs/config.md`, written from the sections: their docstrings are the help and the documentation.

Written by `python -m cadtrain.cli.document`, which adds the note on how to regenerate it; compared in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cadtrain.config.load import preset_names, read_preset
from cadtrain.config.schema import expected, fields_of, section_in
from cadtrain.config.sections import COMPONENTS, MODALITY_SETS, RunConfig

INTRODUCTION = """\
# Configuration

One YAML file describes a run. Start from a preset and change what you need:

```
cadtrain train demo --print-config            # the complete configuration, defaults included
cadtrain launch --gpus 4 my_run.yaml --set batch.global_batch_size=32
```

- A configuration is a file, or the name of a preset. A bare word that names a preset is the preset; write `./demo` for
  a file of that name. Without any, the preset `demo` is taken.
- `--set key.path=value` changes one value; the value is read as YAML (`--set model.image=null`). Items of a list are
  named by position, stages by name as well: `--set curriculum.text.duration=20`.
- Unknown keys are faults. All faults are shown at once, each with its line.
- Relative paths are taken from the working directory, as on the command line.
- Durations carry a unit: `20 steps`, `1.5 epochs`, `10 minutes`; a bare number is steps.
- An epoch has `samples / batch.global_batch_size` steps, rounded up: its short last batch is trained as well.
"""


def config_document() -> str:
    """The text of `docs/config.md`."""
    lines = [INTRODUCTION, *_presets(), *_sections()]
    words = [
        "## Words\n",
        f"- **Components**, in `curriculum.N.multipliers`: {_listed(COMPONENTS)}.",
        f"- **Modality sets**, in `curriculum.N.modalities`: {_listed(MODALITY_SETS)}.",
    ]
    return "\n".join([*lines, *words]) + "\n"


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "The same files lie in `configs/`.\n"
    yield "| preset | what it is |"
    yield "|---|---|"
    for name in preset_names():
        first = read_preset(name).splitlines()[0].removeprefix(f"# {name}: ")
        yield f"| [`{name}`](../configs/{name}.yaml) | {first} |"
    yield ""


def _sections() -> Iterator[str]:
    yield "## Top level\n"
    yield from _table(RunConfig)
    for path, section in _walk(RunConfig, ""):
        yield f"## `{path}`\n"
        yield f"{' '.join((section.__doc__ or '').split())}\n"
        yield from _table(section)


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in fields_of(section).items():
        inner = section_in(field.annotation)
        if inner is not None:
            path = f"{prefix}{key}" + (".N" if "tuple" in str(field.annotation) else "")
            yield path, inner
            yield from _walk(inner, f"{path}.")


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| key | takes | default | what it does |"
    yield "|---|---|---|---|"
    for key, field in fields_of(section).items():
        help_text = " ".join((field.description or "").split())
        cells = (f"`{key}`", expected(field), _default(field), help_text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return _listed(value)
    return "empty" if value == {} else f"`{value}`"


def _listed(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in values)
