"""Python and the packages, against what cadtrain declares; none of them is imported here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from cadtrain.doctor.child import run_python
from cadtrain.doctor.finding import Finding, fail, ok, warn

_EXTRAS = {"gpu": "faster training on GPUs (fused kernels)", "wandb": "metrics in Weights & Biases"}
_TOLD = ("torch", "deepspeed", "transformers", "peft")
"""Packages whose versions are named even where all is well."""
_CAD_KERNEL = """
from OCP.BRepGProp import BRepGProp
from OCP.BRepPrimAPI import BRepPrimAPI_MakeBox
from OCP.GProp import GProp_GProps
properties = GProp_GProps()
BRepGProp.VolumeProperties_s(BRepPrimAPI_MakeBox(2.0, 3.0, 4.0).Shape(), properties)
assert abs(properties.Mass() - 24.0) < 1e-6, properties.Mass()
"""
_SYSTEM_LIBRARIES = {
    "libGL.so.1": "libgl1",
    "libX11.so.6": "libx11-6",
    "libXrender.so.1": "libxrender1",
    "libGLU.so.1": "libglu1-mesa",
}
"""Shared libraries that wheels expect of the system, and the Debian or Ubuntu package of each."""


def check_python() -> Iterator[Finding]:
    """The interpreter, against `requires-python`."""
    text = f"{platform.python_version()} at {sys.executable}"
    try:
        from packaging.specifiers import SpecifierSet

        wanted = metadata.metadata("cadtrain")["Requires-Python"] or ""
        fits = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield warn(
            "Python", f"{text}; cannot be compared: {error}", "Install cadtrain with pip, which brings what it needs."
        )
        return
    if fits:
        yield ok("Python", text)
    else:
        yield fail("Python", f"{text}, wanted {wanted}", "Make a virtual environment with a Python in that range.")


def check_packages() -> Iterator[Finding]:
    """Every declared dependency: installed, and of a version in range. Extras are only worth a warning."""
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(text) for text in metadata.requires("cadtrain") or ()]
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield warn("packages", f"cannot be listed: {error}", "Install cadtrain with pip.")
        return
    good = []
    for wanted in declared:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield fail(wanted.name, "not installed", f"pip install '{wanted.name}{wanted.specifier}'")
            continue
        if wanted.specifier.contains(found, prereleases=True):
            good.append(f"{wanted.name} {found}")
        else:
            yield fail(
                wanted.name, f"{found}, wanted {wanted.specifier}", f"pip install '{wanted.name}{wanted.specifier}'"
            )
    named = [text for text in good if text.split()[0] in _TOLD] or good[:3]
    yield ok("packages", f"{len(good)} as declared, among them {', '.join(named)}")


def check_extras(*, has_gpu: bool) -> Iterator[Finding]:
    """Optional packages."""
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(text) for text in metadata.requires("cadtrain") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return
    for extra, purpose in _EXTRAS.items():
        for wanted in declared:
            if (
                wanted.marker is None
                or wanted.marker.evaluate({"extra": ""})
                or not wanted.marker.evaluate({"extra": extra})
            ):
                continue
            try:
                yield ok(wanted.name, f"{metadata.version(wanted.name)}: {purpose}")
            except metadata.PackageNotFoundError:
                matters = extra == "gpu" and has_gpu
                text = f"not installed (optional: {purpose})"
                yield warn(wanted.name, text, f"pip install 'cadtrain[{extra}]'") if matters else ok(wanted.name, text)


def check_cad_kernel() -> Iterator[Finding]:
    """OpenCascade, by a box whose volume is known."""
    result = run_python(_CAD_KERNEL, seconds=120)
    if result.is_good:
        yield ok("CAD kernel", f"OpenCascade makes solids ({result.seconds:.1f} s with its import)")
        return
    missing = [package for library, package in _SYSTEM_LIBRARIES.items() if library in result.stderr]
    if missing:
        yield fail("CAD kernel", result.reason(), f"apt-get install {' '.join(missing)}")
    else:
        yield fail("CAD kernel", result.reason(), "pip install --force-reinstall cadquery-ocp-novtk")
