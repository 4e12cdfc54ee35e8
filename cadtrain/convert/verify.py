"""`--verify`: proof that what was converted is what the ranks held when they saved.

Both ends are compared; between them lie only the cast and the merge:
- every weight as it comes out of the shards against the hashes of the live weights (`checkpoint.weight_sums`), before it is
  cast or merged;
- every weight in the finished files, read back with torch's or safetensors' own reader, against the bytes that were written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from cadtrain.checkpoint.mapped import copy_span
from cadtrain.checkpoint.safe_load import load_shard
from cadtrain.checkpoint.shard_files import ShardFiles, open_shard_files
from cadtrain.checkpoint.weight_files import bytes_of
from cadtrain.checkpoint.weight_sums import RunningCheck, WeightSum, read_sums
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.errors import CheckpointError

_PIECE_VALUES = 1 << 18
_HINT = "The checkpoint cannot be trusted: take another one, and keep this one for a report."


class CheckedWeights(ShardedWeights):
    """Weights that are compared with the live ones whenever they are read to the end."""

    def __init__(self, files: ShardFiles, sums: Mapping[str, WeightSum]) -> None:
        super().__init__(files)
        self._sums = sums
        self.checked: set[str] = set()
        """Names of the weights that were read and are the live ones."""

    @classmethod
    def open(cls, folder: Path) -> CheckedWeights:
        """As `ShardedWeights.open`; raises `CheckpointError` too where the folder has no hashes, or of other weights."""
        found = cls(open_shard_files(folder), read_sums(folder))
        own = {name for name, info in found.info.items() if info.alias_of is None}
        if odd := sorted(own ^ set(found._sums)):
            where = "shards but not in the hashes" if odd[0] in own else "hashes but not in the shards"
            raise CheckpointError(f"{odd[0]} is in the {where} of the live weights.", where=str(folder), hint=_HINT)
        return found

    def pieces(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """As in `ShardedWeights`; raises `CheckpointError` after the last piece where the weight is not the live one."""
        name = self.info[name].alias_of or name
        check = RunningCheck(self._sums[name])
        for piece in super().pieces(name, count):
            check.update(piece)
            yield piece
        if fault := check.finish():
            raise CheckpointError(f"{name} {fault}.", where=str(self.folder), hint=_HINT)
        self.checked.add(name)


class WrittenHashes:
    """Hashes of what went into files, by name, to be compared with what comes out of them."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def add(self, name: str, piece: torch.Tensor) -> None:
        """Take the next values of a weight, flat, as they were written."""
        self._hashes.setdefault(name, xxhash.xxh3_128()).update(bytes_of(piece).data)

    def compare(
        self, files: Sequence[Path], *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Read `files` back; raises `CheckpointError` naming a weight that is missing from them, or other than was written.

        `progress` gets bytes read and bytes in all.
        """
        left, done, total = dict(self._hashes), 0, sum(path.stat().st_size for path in files)
        for path in files:
            for name, tensor in _read_back(path):
                if name in left and _hash_mapped(tensor) == left[name].hexdigest():
                    del left[name]
                    done += tensor.nbytes
                    progress(done, total)
        if left:
            raise CheckpointError(
                f"{len(left)} weights came back otherwise than they were written, the first is {next(iter(left))}.",
                where=str(files[0].parent),
                hint="The disk, or its file system, is at fault.",
            )


def _read_back(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with open(path, "rb") as file:
        is_torch = file.read(2) == b"PK"  # the name is still a temporary one
    if is_torch:
        yield from load_shard(path, mmap=True, stand_ins=True).items()
        return
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"cannot be read back: {error}", where=str(path)) from error


def _hash_mapped(tensor: torch.Tensor) -> str:
    found, flat = xxhash.xxh3_128(), tensor.view(-1)
    for start in range(0, flat.numel(), _PIECE_VALUES):
        piece = torch.empty(min(_PIECE_VALUES, flat.numel() - start), dtype=flat.dtype)
        copy_span(piece, [flat], start)
        found.update(bytes_of(piece).data)
    return str(found.hexdigest())
