"""What an export writes: formats, their files' names, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cadtrain.data.writing.pipeline import CAMERA_ORDER
from cadtrain.errors import UsageError


class ExportFormat(StrEnum):
    """What can be written."""

    STEP = "step"
    STL = "stl"
    GLB = "glb"
    PNG = "png"
    CADQUERY = "cadquery"
    DEEPCAD17 = "deepcad17"
    JSON = "json"
    TEXT = "text"

    @property
    def suffix(self) -> str:
        """The files' suffix, with the dot."""
        return {"cadquery": ".py", "deepcad17": ".npy", "text": ".txt"}.get(self.value, f".{self.value}")

    @property
    def needs_solid(self) -> bool:
        """Whether the kernel has to build the design."""
        return self in (ExportFormat.STEP, ExportFormat.STL, ExportFormat.GLB, ExportFormat.PNG)


def parse_formats(text: str) -> tuple[ExportFormat, ...]:
    """Formats from a list with commas, each once; raises `UsageError` that names all unknown ones."""
    words = list(dict.fromkeys(word for part in text.split(",") if (word := part.strip().lower())))
    known = [format_.value for format_ in ExportFormat]
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        found = f"no format named {', '.join(unknown)}" if unknown else "no format is given"
        raise UsageError(f"{found}.", where="--format", hint=f"Known: {', '.join(known)}.")
    return tuple(ExportFormat(word) for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is written of each design."""

    formats: tuple[ExportFormat, ...]
    quantized: bool = False
    """Round exact designs to the 8-bit grid."""
    num_views: int = 1
    image_size: int = 512
    size_mm: float | None = None
    """Longest side of the solid in STEP, STL and GLB; None keeps the design's own."""

    def __post_init__(self) -> None:
        for name, low, high in (("num_views", 1, len(CAMERA_ORDER)), ("image_size", 14, 4096)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} {getattr(self, name)} is out of range.", hint=f"Use {low} to {high}.")
        if self.size_mm is not None and not 0 < self.size_mm < 1e9:
            raise UsageError(f"a size of {self.size_mm:g} mm.", where="--size", hint="Use a number above 0.")

    def names(self, stem: str) -> list[str]:
        """The names of a design's files, in the order of the formats."""
        found: list[str] = []
        for format_ in self.formats:
            many = format_ is ExportFormat.PNG and self.num_views > 1
            stems = [f"{stem}_{view:03d}" for view in range(self.num_views)] if many else [stem]
            found += [each + format_.suffix for each in stems]
        return found
