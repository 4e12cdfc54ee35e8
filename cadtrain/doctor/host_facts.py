"""What one host says of itself: `python -m cadtrain.doctor.host_facts FOLDER TOKEN`, run there by `hosts.py`."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

from cadtrain.launch.devices import find_gpus
from cadtrain.launch.environment import package_versions


def main() -> None:
    """Print one line of facts."""
    folder, token = Path(sys.argv[1]), sys.argv[2]
    names = ("cadtrain", "torch", "deepspeed", "transformers")
    facts = {
        "sees_folder": (folder / token).is_file(),
        "may_write": os.access(folder, os.W_OK),
        "gpus": len(find_gpus()),
        "versions": {
            "python": platform.python_version(),
            **{name: version for name, version in package_versions().items() if name in names},
        },
    }
    print("facts", json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
