"""What DeepSpeed compiles its extensions with, and where it keeps them."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cadtrain.doctor.child import ChildResult, run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.doctor.machine import NETWORK_FILE_SYSTEMS, file_system
from cadtrain.launch.environment import clean_arch_list

_STALE_SECONDS = 3600.0
"""Age of a lock from which no build can be under way: the longest takes some minutes."""
_BASELINE_GXX = 9
"""First g++ with all of C++17, which torch's headers want."""


Compiles = Literal["never", "with --offload", "now"]
"""Whether DeepSpeed compiles anything: its host optimizer, where GPUs offload. CPU ranks never do."""


def check_compilers(*, compiles: Compiles, torch_cuda: str | None) -> Iterator[Finding]:
    """g++, ninja and nvcc; what is missing fails only where DeepSpeed compiles `now`."""
    yield _gxx(compiles)
    yield _ninja(compiles)
    if torch_cuda is not None:
        yield _nvcc(torch_cuda)


def check_extensions() -> Iterator[Finding]:
    """The architecture list and the cache folder of compiled extensions."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if arch_list is not None:
        if clean_arch_list(arch_list) == arch_list:
            yield ok("TORCH_CUDA_ARCH_LIST", arch_list)
        else:
            yield warn(
                "TORCH_CUDA_ARCH_LIST",
                f"{arch_list}: DeepSpeed cannot read the letters",
                f"cadtrain launch mends it for its ranks; elsewhere: export TORCH_CUDA_ARCH_LIST='{clean_arch_list(arch_list)}'",
            )
    yield _extension_cache(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"))


def _extension_cache(folder: Path) -> Finding:
    name, elsewhere = (
        "extension cache",
        f"export TORCH_EXTENSIONS_DIR={tempfile.gettempdir()}/torch_extensions_{os.getuid()}",
    )
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return fail(name, f"{folder}: {existing}: {error.strerror or error}", elsewhere)
    # torch writes `lock` beside an extension while it compiles, and waits for ever for one that a kill left behind.
    locks = [path for path in folder.glob("**/lock") if path.is_file()]
    stale = [path for path in locks if time.time() - path.stat().st_mtime > _STALE_SECONDS]
    if stale:
        remedy = f"rm {' '.join(str(path) for path in stale[:3])}"
        return warn(name, f"{stale[0]} is a lock that a killed build left: the next one waits for it for ever", remedy)
    kind = file_system(existing)
    if kind in NETWORK_FILE_SYSTEMS:
        return warn(name, f"{folder} lies on a network disk ({kind}): builds are slow and locks unsafe", elsewhere)
    return ok(name, f"{folder} can be written")


def _missing(name: str, evidence: str, remedy: str, compiles: Compiles) -> Finding:
    match compiles:
        case "never":
            return ok(name, f"{evidence}; CPU ranks compile nothing")
        case "with --offload":
            return warn(name, f"{evidence}; needed for --offload", remedy)
        case "now":
            return fail(name, f"{evidence}; DeepSpeed compiles its host optimizer with it", remedy)


def _gxx(compiles: Compiles) -> Finding:
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        return _missing("g++", f"{compiler} not found", "apt-get install g++", compiles)
    result = _run([path, "-dumpfullversion", "-dumpversion"])
    version = result.stdout.strip() if result.is_good else ""
    is_old = "g++" in Path(path).name and bool(version) and int(version.split(".")[0]) < _BASELINE_GXX
    if is_old and compiles != "never":
        return warn("g++", f"{version} at {path}", f"Install g++ {_BASELINE_GXX} or newer: torch's headers need C++17.")
    return ok("g++", f"{version or 'found'} at {path}")


def _ninja(compiles: Compiles) -> Finding:
    beside = Path(sys.executable).parent / "ninja"
    path = shutil.which("ninja") or (str(beside) if beside.is_file() else None)
    if path is None:
        return _missing("ninja", "not found", "pip install ninja", compiles)
    return ok("ninja", f"{_run([path, '--version']).stdout.strip() or 'found'} at {path}")


def _nvcc(torch_cuda: str) -> Finding:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    path = shutil.which("nvcc") or next((name for name in candidates if Path(name).is_file()), None)
    if path is None:
        return ok("nvcc", "not found; cadtrain does not need it")
    match = re.search(r"release (\d+)\.(\d+)", _run([path, "--version"]).stdout)
    if match is None:
        return warn("nvcc", f"{path} gives no version", "Reinstall the CUDA toolkit, or unset CUDA_HOME.")
    version = f"{match[1]}.{match[2]}"
    if match[1] != torch_cuda.split(".")[0]:
        remedy = f"Only matters where DeepSpeed compiles for GPUs: install the CUDA {torch_cuda} toolkit, or unset CUDA_HOME."
        return warn("nvcc", f"{version} at {path}, torch is built for CUDA {torch_cuda}", remedy)
    return ok("nvcc", f"{version} at {path}, torch is built for CUDA {torch_cuda}")


def _run(command: list[str]) -> ChildResult:
    return run_all([command], [{}], seconds=30)[0]
