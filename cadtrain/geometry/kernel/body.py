"""The body as the kernel holds it, and what all rooms of this package need of OpenCascade."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from OCP.BRepCheck import BRepCheck_Analyzer
from OCP.Standard import Standard_Failure
from OCP.TopAbs import TopAbs_FACE, TopAbs_SOLID
from OCP.TopExp import TopExp_Explorer
from OCP.TopoDS import TopoDS

as_face: Callable[[Any], Any] = getattr(TopoDS, "Face_s", None) or TopoDS.Face

# What the kernel raises: its own failures, and the binding's error for what it cannot translate.
KERNEL_ERRORS = (Standard_Failure, RuntimeError)


@dataclass(frozen=True, slots=True, eq=False)
class Solid:
    """A body (one solid or several apart) as the kernel holds it."""

    shape: Any
    unit: float
    """How long the kernel's unit is in the design's, metres."""
    known_validity: bool | None = None
    """What `passes_check` said of the shape, where it was asked: it is among the slowest things to ask."""


def scaled(solid: Solid, factor: float) -> Solid:
    """The body `factor` times as large about the origin; nothing is computed anew."""
    return Solid(solid.shape, solid.unit * factor, solid.known_validity)


def passes_check(shape: Any) -> bool:
    """Whether topology and geometry of a shape agree (`BRepCheck_Analyzer`)."""
    return bool(BRepCheck_Analyzer(shape).IsValid())


def has_solid(shape: Any) -> bool:
    """Whether there is anything of volume in a shape."""
    return not shape.IsNull() and TopExp_Explorer(shape, TopAbs_SOLID).More()


def faces_of(shape: Any) -> Iterable[Any]:
    """The shape's faces."""
    explorer = TopExp_Explorer(shape, TopAbs_FACE)
    while explorer.More():
        yield as_face(explorer.Current())
        explorer.Next()


def solids_of(shape: Any) -> Iterable[Any]:
    """The shape's solids."""
    explorer = TopExp_Explorer(shape, TopAbs_SOLID)
    while explorer.More():
        yield explorer.Current()
        explorer.Next()


def reason(error: Exception) -> str:
    """What a kernel's error says, in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
