"""What DeepSpeed writes and reads shards with, in place of its own pickles: a sink for what it saves, a safe reader."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.frozen import with_frozen
from cadtrain.checkpoint.safe_load import load_shard
from cadtrain.checkpoint.shard_writer import WRITE_FAULTS, ShardSink


def safe_checkpoint_engine() -> Any:
    """A checkpoint engine for DeepSpeed that hands shards to a sink, reads tensors and plain values and runs no code from a file."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        sink: ShardSink | None = None
        failure: Exception | None = None

        def save(self, state_dict: Any, path: str) -> None:
            # Kept until all ranks are through DeepSpeed's barriers: raised here it would leave the others waiting in one.
            assert self.sink is not None, "shards are written by DeepSpeedEngine.save alone"
            try:
                self.sink(Path(path), state_dict)
            except WRITE_FAULTS as error:
                self.failure = error

        def load(self, path: str, map_location: Any = None) -> Any:
            content = load_shard(Path(path), map_location=map_location)
            return with_frozen(content, Path(path), partial(load_shard, map_location=map_location, mmap=True))

    return SafeCheckpointEngine()
