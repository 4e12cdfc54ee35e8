"""Bodies as STEP files."""

from __future__ import annotations

from pathlib import Path

from OCP.BRepBuilderAPI import BRepBuilderAPI_Transform
from OCP.gp import gp_Pnt, gp_Trsf
from OCP.IFSelect import IFSelect_RetDone
from OCP.Message import Message
from OCP.STEPControl import STEPControl_AsIs, STEPControl_Reader, STEPControl_Writer

from cadtrain.errors import GeometryError
from cadtrain.geometry.kernel.body import KERNEL_ERRORS, Solid, has_solid, reason

MM_PER_METRE = 1000.0


def write_step(solid: Solid, path: Path) -> None:
    """Write the body as STEP (AP214, millimetres); `exchange` does it atomically. Raises `GeometryError` of kind
    `step`."""
    _silence()
    scaling = gp_Trsf()
    scaling.SetScale(gp_Pnt(0.0, 0.0, 0.0), solid.unit * MM_PER_METRE)
    shape = BRepBuilderAPI_Transform(solid.shape, scaling, True).Shape()
    writer = STEPControl_Writer()
    if writer.Transfer(shape, STEPControl_AsIs) != IFSelect_RetDone or writer.Write(str(path)) != IFSelect_RetDone:
        raise GeometryError("step", f"the kernel could not write {path}")


def read_step(path: Path) -> Solid:
    """The body in a STEP file, whatever its unit. Raises `GeometryError` of kind `step`."""
    _silence()
    reader = STEPControl_Reader()
    try:
        if reader.ReadFile(str(path)) != IFSelect_RetDone:
            raise GeometryError("step", f"{path} cannot be read as STEP")
        reader.TransferRoots()
        shape = reader.OneShape()
    except KERNEL_ERRORS as error:
        raise GeometryError("step", reason(error), where=str(path)) from error
    if not has_solid(shape):
        raise GeometryError("step", f"{path} holds no solid")
    return Solid(shape, 1 / MM_PER_METRE)


def _silence() -> None:
    """Keep the kernel's transfer statistics off stdout, which belongs to results."""
    messenger = Message.DefaultMessenger_s()
    for printer in list(messenger.Printers()):
        messenger.RemovePrinter(printer)
