"""What `nvidia-smi` and the kernel's log tell of the GPUs: memory errors, slowed clocks, links, modes, and who holds them."""

from __future__ import annotations

import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cadtrain.doctor.child import run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.devices import MIG, Gpu
from cadtrain.launch.evidence import kernel_log

PCIE_LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second and lane in one direction, by generation."""
_SLOWDOWNS = {
    "hw_thermal_slowdown": "it is too hot (hardware)",
    "sw_thermal_slowdown": "it is too hot (driver)",
    "hw_power_brake_slowdown": "the power supply asks for less",
    "hw_slowdown": "the hardware slows it down",
}
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
_XIDS = {
    31: ("a memory page fault of a program", False),
    43: ("a program's work was stopped", False),
    45: ("a program was ended", False),
    48: ("an uncorrectable memory error", True),
    62: ("an internal halt", True),
    63: ("a memory row was remapped", False),
    64: ("a memory row could not be remapped", True),
    74: ("an NVLink error", True),
    79: ("the GPU has fallen off the bus", True),
    94: ("a contained memory error", False),
    95: ("an uncontained memory error", True),
    119: ("its firmware does not answer", True),
    120: ("its firmware failed", True),
}
"""Xid numbers: what they mean, and whether the GPU needs a reset or a repair (Source: NVIDIA, XID Errors)."""


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """One GPU as `nvidia-smi -q -x` describes it."""

    index: int
    uuid: str
    bus_id: str
    name: str
    has_persistence: bool
    has_mig: bool
    uncorrected_errors: int
    needs_reset: tuple[str, ...]
    """Repairs of memory rows that wait for a reset."""
    has_failed_rows: bool
    slowdowns: tuple[str, ...]
    link_generation: tuple[int, int] | None
    """(now, most) of PCIe; it falls while the GPU is idle."""
    link_width: tuple[int, int] | None

    @property
    def pcie_bytes(self) -> float | None:
        """Bytes a second that its slot gives in one direction."""
        if self.link_generation is None or self.link_width is None:
            return None
        return PCIE_LANE_BYTES.get(self.link_generation[1], 0.0) * self.link_width[0] or None


def read_health(seconds: float = 20) -> list[GpuHealth] | None:
    """All installed GPUs; None where `nvidia-smi` is missing or does not answer."""
    text = _smi("-q", "-x", seconds=seconds)
    return parse_health(text) if text is not None else None


def read_topology(seconds: float = 20) -> dict[tuple[int, int], str] | None:
    """How each pair of GPUs is linked (`NV18`, `PIX`, `SYS`, …); None where that cannot be asked."""
    text = _smi("topo", "-m", seconds=seconds)
    return parse_topology(text) if text is not None else None


def parse_health(text: str) -> list[GpuHealth]:
    """The GPUs in the output of `nvidia-smi -q -x`; empty where it is no such thing."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return []
    return [_one(index, element) for index, element in enumerate(root.iter("gpu"))]


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """The pairs of GPUs in the output of `nvidia-smi topo -m`, each once."""
    clean = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in clean.splitlines()]
    header = next((row for row in rows if row and row[0] == "GPU0" and all(not _is_link(cell) for cell in row)), [])
    columns = [int(cell[3:]) for cell in header if re.fullmatch(r"GPU\d+", cell)]
    found = {}
    for row in rows:
        if not row or not re.fullmatch(r"GPU\d+", row[0]) or len(row) <= len(columns) or row == header:
            continue
        first = int(row[0][3:])
        for second, link in zip(columns, row[1:], strict=False):
            if first < second and _is_link(link):
                found[first, second] = link
    return found


def _is_link(cell: str) -> bool:
    return re.fullmatch(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS", cell) is not None


def check_health(
    gpus: Sequence[Gpu], health: Sequence[GpuHealth], kernel_lines: Sequence[str] | None = None
) -> Iterator[Finding]:
    """Memory errors, slowed clocks, narrow slots, persistence and the kernel's complaints of the GPUs a run would use."""
    lines = list(kernel_log("NVRM: Xid")) if kernel_lines is None else list(kernel_lines)
    used = [item for item in health if any(gpu.uuid == item.uuid for gpu in gpus)]
    findings = [finding for item in used for finding in (*_memory(item), *_speed(item), *_complaints(item, lines))]
    yield from findings
    if used and not findings:
        yield ok("GPU health", "no memory errors, no slowed clocks, no complaints of the kernel")
    if idle := [str(item.index) for item in used if not item.has_persistence]:
        yield warn(
            "GPU persistence",
            f"off on GPU {', '.join(idle)}: the driver is loaded anew at every start, which takes seconds",
            "sudo nvidia-smi -pm 1",
        )


def check_visible(environ: Mapping[str, str] = os.environ, health: Sequence[GpuHealth] = ()) -> Iterator[Finding]:
    """`CUDA_VISIBLE_DEVICES`: names that no GPU has, and parts of GPUs."""
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        if split := [str(item.index) for item in health if item.has_mig]:
            yield warn(
                "MIG",
                f"GPU {', '.join(split)} is divided into instances, which ranks cannot use together",
                "sudo nvidia-smi -mig 0 (stops what runs there), or choose whole GPUs: --gpus",
            )
        return
    entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
    if any(entry.startswith(MIG) for entry in entries):
        yield fail(
            "CUDA_VISIBLE_DEVICES",
            f"{mask}: DeepSpeed reads device numbers only, and no collective works between instances",
            "Choose whole GPUs, or run one rank in a container that has this one instance (unset the variable there).",
        )
        return
    unknown = [
        entry for entry in entries if health and not any(_is_named(entry, item) for item in health) and entry != "-1"
    ]
    if unknown:
        yield fail(
            "CUDA_VISIBLE_DEVICES",
            f"{mask}: no GPU is called {unknown[0]}, and CUDA ignores everything after it",
            f"export CUDA_VISIBLE_DEVICES={','.join(str(item.index) for item in health)}",
        )
    else:
        yield ok("CUDA_VISIBLE_DEVICES", mask or "empty: every GPU is hidden")


def check_topology(gpus: Sequence[Gpu], links: Mapping[tuple[int, int], str]) -> Iterator[Finding]:
    """Which links the GPUs of a run have between them."""
    numbers = sorted(int(gpu.id) for gpu in gpus if gpu.id.isdecimal())
    pairs = {pair: links[pair] for pair in links if pair[0] in numbers and pair[1] in numbers}
    if not pairs:
        return
    kinds = sorted(set(pairs.values()))
    text = ", ".join(
        f"{kind} ({_LINKS.get(kind, 'NVLink')}) × {sum(v == kind for v in pairs.values())}" for kind in kinds
    )
    has_nvlink = [kind.startswith("NV") for kind in pairs.values()]
    if any(has_nvlink) and not all(has_nvlink):
        yield warn(
            "GPU links",
            f"{text}: pairs without NVLink hold up the others",
            "Take GPUs that are linked to each other: --gpus with a list, see nvidia-smi topo -m.",
        )
    elif "SYS" in kinds and len(kinds) > 1:
        yield warn(
            "GPU links",
            f"{text}: some pairs talk through both processors",
            "Take GPUs of one processor: --gpus with a list, see nvidia-smi topo -m.",
        )
    else:
        yield ok("GPU links", text)


_LINKS = {
    "PIX": "one PCIe switch", "PXB": "several PCIe switches", "PHB": "PCIe through the processor",
    "NODE": "PCIe within a NUMA node", "SYS": "PCIe and between processors",
}  # fmt: skip


def _memory(item: GpuHealth) -> Iterator[Finding]:
    name = f"GPU {item.index} memory errors"
    if item.has_failed_rows:
        yield fail(
            name, "rows that failed could not be replaced", f"Leave GPU {item.index} out (--gpus) and have it replaced."
        )
    elif item.uncorrected_errors:
        yield warn(
            name,
            f"{item.uncorrected_errors} uncorrected since the driver started",
            f"Reset it when nothing runs there: sudo nvidia-smi -r -i {item.index}; replace it if they come back.",
        )
    elif item.needs_reset:
        yield warn(
            name,
            f"{' and '.join(item.needs_reset)} waits for a reset",
            f"When nothing runs there: sudo nvidia-smi -r -i {item.index}",
        )


def _speed(item: GpuHealth) -> Iterator[Finding]:
    if item.slowdowns:
        yield warn(
            f"GPU {item.index} clocks",
            f"slowed down now: {', '.join(item.slowdowns)}",
            "See to its cooling and power; nvidia-smi -q -d PERFORMANCE shows it.",
        )
    if item.link_width is not None and item.link_width[0] < item.link_width[1]:
        yield warn(
            f"GPU {item.index} slot",
            f"{item.link_width[0]} of {item.link_width[1]} PCIe lanes",
            "Seat the card anew, or move it to a full slot: offloading and links through PCIe are slower by that much.",
        )


def _complaints(item: GpuHealth, lines: Sequence[str]) -> Iterator[Finding]:
    numbers = [int(match[2]) for line in lines if (match := _XID.search(line)) and _same_bus(match[1], item.bus_id)]
    for number in sorted(set(numbers)):
        meaning, is_grave = _XIDS.get(number, ("see NVIDIA's list of Xid errors", False))
        text = f"Xid {number} × {numbers.count(number)} in the kernel's log: {meaning}"
        if is_grave:
            yield warn(
                f"GPU {item.index} Xid",
                text,
                f"Reset it when nothing runs there (sudo nvidia-smi -r -i {item.index}) or restart the host; "
                "if it comes back, leave the GPU out (--gpus) and have it looked at.",
            )


def _same_bus(first: str, second: str) -> bool:
    """Whether two ways to write a PCI address (`0000:65:00`, `00000000:65:00.0`) mean the same slot."""
    numbers = [re.fullmatch(r"0*([0-9a-f]*):([0-9a-f]+):([0-9a-f]+)(\.\d+)?", text.lower()) for text in (first, second)]
    return all(numbers) and len({match.groups()[:3] for match in numbers if match}) == 1


def _is_named(entry: str, item: GpuHealth) -> bool:
    return item.uuid.startswith(entry) if entry.startswith("GPU-") else entry == str(item.index)


def _one(index: int, element: ElementTree.Element) -> GpuHealth:
    def text(path: str) -> str:
        return (element.findtext(path) or "").strip()

    reasons = element.find("clocks_event_reasons")
    reasons = reasons if reasons is not None else element.find("clocks_throttle_reasons")
    active = [child.tag for child in reasons if (child.text or "").strip() == "Active"] if reasons is not None else []
    volatile = element.find("ecc_errors/volatile")
    errors = [child for child in volatile.iter() if "uncorrectable" in child.tag] if volatile is not None else []
    return GpuHealth(
        index=index,
        uuid=text("uuid"),
        bus_id=element.get("id", ""),
        name=text("product_name"),
        has_persistence=text("persistence_mode") == "Enabled",
        has_mig=text("mig_mode/current_mig") == "Enabled",
        uncorrected_errors=sum(int(child.text or 0) for child in errors if (child.text or "").strip().isdecimal()),
        needs_reset=tuple(
            name
            for path, name in (
                ("remapped_rows/remapped_row_pending", "a row remapping"),
                ("retired_pages/pending_retirement", "a page retirement"),
            )
            if text(path) == "Yes"
        ),
        has_failed_rows=text("remapped_rows/remapped_row_failure") == "Yes",
        slowdowns=tuple(
            words for key, words in _SLOWDOWNS.items() if any(tag.endswith(f"_reason_{key}") for tag in active)
        ),
        link_generation=_pair(text, "pci/pci_gpu_link_info/pcie_gen", "link_gen"),
        link_width=_pair(text, "pci/pci_gpu_link_info/link_widths", "link_width"),
    )


def _pair(text, folder: str, name: str) -> tuple[int, int] | None:  # type: ignore[no-untyped-def]
    now, most = (text(f"{folder}/{which}_{name}").removesuffix("x") for which in ("current", "max"))
    return (int(now), int(most)) if now.isdecimal() and most.isdecimal() else None


def _smi(*arguments: str, seconds: float) -> str | None:
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    result = run_all([[path, *arguments]], [{}], seconds=seconds)[0]
    return result.stdout if result.is_good else None
