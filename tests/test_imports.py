"""The picture of the package, kept true by reading its imports.

    cli > ui > services (doctor > launch > plan; convert) and train > {inference, evaluation}
        > {model, data, metrics, checkpoint} > geometry > cad > shared ground

`config` serves from `data` upward and stands on the shared ground alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cadtrain"

SHARED_GROUND = {"errors", "units", "logs", "distributed", "heartbeat", "host_memory", "gpu_memory", "hub"}
FOUNDATIONS = {"model", "data", "metrics", "checkpoint"}
USES = {"inference", "evaluation"}
BELOW_SERVICES = {"config", "cad", "geometry"} | FOUNDATIONS | USES

# room: the rooms that it may look into, besides itself and the shared ground
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "logs": set(),
    "distributed": set(),
    "heartbeat": set(),
    "host_memory": set(),
    "gpu_memory": set(),
    "hub": set(),
    "config": set(),
    "cad": set(),
    "geometry": {"cad"},
    "model": {"config", "cad", "geometry"},
    "data": {"config", "cad", "geometry"},
    "metrics": {"config", "cad", "geometry"},
    "checkpoint": {"config", "cad", "geometry"},
    "inference": {"config", "cad", "geometry"} | FOUNDATIONS,
    "evaluation": {"config", "cad", "geometry"} | FOUNDATIONS | {"inference"},
    "train": BELOW_SERVICES,
    "plan": BELOW_SERVICES,
    "convert": BELOW_SERVICES,
    "launch": BELOW_SERVICES | {"plan"},  # the stage is chosen by plan
    "doctor": BELOW_SERVICES | {"plan", "launch"},  # its all-reduce starts ranks on the devices that launch would take
    "ui": BELOW_SERVICES | {"train", "launch", "plan", "convert", "doctor"},
    "cli": BELOW_SERVICES | {"train", "launch", "plan", "convert", "doctor", "ui"},
    "__main__": {"cli"},
}

# third party: the modules that may import it (a module, or a whole room)
OWNERS: dict[str, set[str]] = {
    "typer": {"cli"},
    "rich": {"ui"},
    "pydantic": {"config"},
    "ruamel": {"config"},
    "deepspeed": {"train.engine", "train.shards"},
    "OCP": {"geometry.kernel"},
    "peft": {"model", "convert"},
    "wandb": {"metrics.sinks.wandb"},
    "tensorboard": {"metrics.sinks.tensorboard"},
    "datasets": {"data.shards"},
    "liger_kernel": {"model"},
}

TORCH_FREE = {"cad", "config", "plan", "launch", "cli", "ui", "geometry", "errors", "units", "logs", "heartbeat", "host_memory", "hub"}
"""Rooms that never import torch, not even inside a function."""


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    importer: str
    """Module inside the package, e.g. `train.engine`."""
    line: int
    target: str
    """Full dotted name, e.g. `cadtrain.model.build` or `torch.nn`."""
    is_deferred: bool
    """Inside a function, or under `TYPE_CHECKING`."""

    @property
    def room(self) -> str:
        return self.importer.split(".")[0]

    def __str__(self) -> str:
        return f"cadtrain/{self.importer.replace('.', '/')}.py:{self.line} imports {self.target}"


def read_imports() -> Iterator[Import]:
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from _walk(tree, "cadtrain" if module == "__init__" else module, is_deferred=False)


def _walk(node: ast.AST, module: str, *, is_deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = is_deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, child.lineno, alias.name, is_deferred)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: write imports in full"
            names = (
                [f"{child.module}.{alias.name}" for alias in child.names]
                if child.module == "cadtrain"
                else [child.module or ""]
            )
            for name in names:
                yield Import(module, child.lineno, name, is_deferred)
        else:
            yield from _walk(child, module, is_deferred=inside)


IMPORTS = list(read_imports())
ROOMS = sorted(
    {
        item.name.removesuffix(".py")
        for item in PACKAGE.iterdir()
        if item.suffix == ".py" or (item / "__init__.py").is_file()
    }
    - {"__init__"}
)


def test_every_room_is_in_the_picture() -> None:
    assert set(ROOMS) <= set(MAY_IMPORT)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_look_only_downward(room: str) -> None:
    allowed = MAY_IMPORT[room] | SHARED_GROUND | {room, "__version__"}
    if room in SHARED_GROUND:
        allowed -= SHARED_GROUND - {room, "errors", "units"}
    upward = [
        str(item)
        for item in IMPORTS
        if item.room == room and item.target.startswith("cadtrain.") and item.target.split(".")[1] not in allowed
    ]
    assert upward == []


@pytest.mark.parametrize("third_party", sorted(OWNERS))
def test_a_third_party_has_one_owner(third_party: str) -> None:
    owners = OWNERS[third_party]
    elsewhere = [
        str(item)
        for item in IMPORTS
        if item.target.split(".")[0] == third_party
        and item.room not in owners
        and not any(f"{item.importer}.".startswith(f"{owner}.") for owner in owners)
    ]
    assert elsewhere == []


def test_rooms_without_torch() -> None:
    assert [
        str(item) for item in IMPORTS if item.room in TORCH_FREE and item.target.split(".")[0] in ("torch", "deepspeed")
    ] == []


def test_command_modules_import_light_things_at_their_top() -> None:
    """The body of a command may import what it needs; the module may not, or `cadtrain --help` waits for it."""
    light = {"cadtrain.cli", "cadtrain.errors", "cadtrain.units", "typer", "cadtrain.__version__"}
    heavy = [
        str(item)
        for item in IMPORTS
        if item.room == "cli" and not item.is_deferred and item.target.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{item.target}.".startswith(f"{name}.") for name in light)
    ]  # fmt: skip
    assert heavy == []


def test_the_reader_sees_imports() -> None:
    """A guard for the guard."""
    assert any(item.importer == "cli.app" and item.target == "typer" and not item.is_deferred for item in IMPORTS)
    assert any(item.importer == "train.engine" and item.target == "deepspeed" and item.is_deferred for item in IMPORTS)
