"""A rank of `measure_peaks`: imports and compiles what it needs, and waits until its GPUs are free.

While one configuration is measured, the ranks of the next ones can so get ready without touching the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

GO_NAME = "go"
WAIT_SECONDS = 900.0
COMPILE_ADAM = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


def main(arguments: list[str]) -> None:
    folder = Path(arguments[arguments.index("--run-dir") + 1])
    import deepspeed  # noqa: F401

    import cadtrain.train.run  # noqa: F401, transformers and peft
    from cadtrain.train import worst_step

    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    if "offload_optimizer: true" in (folder / "config.yaml").read_text(encoding="utf-8") and environment["gpus"]:
        # In a process of its own, since compiling asks for the GPU's properties and would hold a context on it.
        subprocess.run([sys.executable, "-c", COMPILE_ADAM], check=False)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (folder.parent / GO_NAME).exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{folder.parent / GO_NAME} never came")
        time.sleep(0.02)
    worst_step.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
