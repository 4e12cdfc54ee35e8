"""A checkpoint of any ZeRO stage and any number of ranks, laid out anew for the engine that goes on from it.

Every rank reads each weight and its Adam moments whole, one at a time, from the mapped shards, and keeps its own part:

    stage   master weights and moments of a weight                        training weights
    0       whole, on every rank                                          whole
    1, 2    a span of the group's flat vector (`_hp_mapping`), or none    whole
    3       1/N of the weight, in its sub-group's flat vector             1/N (`ds_tensor`); small ones also whole

Source of the layouts: DeepSpeed 0.19.8, runtime/zero/{stage_1_and_2,stage3}.py, utils/tensor_fragment.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cadtrain.checkpoint.adam_state import AdamState, adam_states
from cadtrain.checkpoint.shard_files import open_shard_files
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.errors import CheckpointError
from cadtrain.model.cad_mllm import CadMllm


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of one trained weight: `count` values from `start` of the weight lie at `at` of the flat `master`."""

    master: torch.Tensor
    at: int
    start: int
    count: int


class Layout:
    """Where DeepSpeed's optimizer keeps what belongs to each parameter on this rank."""

    def __init__(self, wrapper: Any, stage: int, rank: int) -> None:
        self.stage = stage
        self._wrapper = wrapper
        self.rank = rank
        self._plain = dict(_plain_masters(wrapper)) if stage == 0 else {}

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer that holds the moments."""
        return self._wrapper if isinstance(self._wrapper, torch.optim.Optimizer) else self._wrapper.optimizer

    def part(self, parameter: torch.nn.Parameter) -> Part | None:
        """This rank's part of a trained weight, None where it has none."""
        if self.stage == 0:
            return Part(self._plain[parameter], 0, 0, parameter.numel())
        if self.stage == 3:
            group, at, count = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
            return Part(self._wrapper.fp32_partitioned_groups_flat[group], at, self.rank * count, count)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.adam.param_groups[mapping.param_group_index]["params"][0]
        whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Part(flat, own.start, whole.start, own.numel)

    def put_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Set what forward and backward use; `value` is the whole weight."""
        if self.stage == 3:
            held = parameter.ds_tensor  # type: ignore[attr-defined]
            held.data.copy_(_span(value, self.rank * held.numel(), held.numel()).view(held.shape))
        else:
            parameter.data.copy_(value)

    def settle(self) -> None:
        """After the last weight: give the small weights that stage 3 keeps whole their new values. Collective."""
        kept = getattr(self._wrapper, "persistent_parameters", None)
        if self.stage == 3 and kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)


def load_resharded(
    model: CadMllm, layout: Layout, groups: Sequence[Sequence[str]], folder: Path, *, with_adam: bool = True
) -> None:
    """Load weights, buffers and, `with_adam`, Adam's state of the checkpoint's shards in `folder`; `layout.settle` comes after.

    `groups` are the names of the trained weights as the optimizer groups them. Raises `CheckpointError` naming the
    weights that the checkpoint lacks or has in another shape.
    """
    files = open_shard_files(folder)
    weights, adam = ShardedWeights(files), adam_states(files, groups) if with_adam else {}
    trained = {name for group in groups for name in group}
    _check_names(model, weights, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[name]
            layout.put_weight(parameter, value)
            part = layout.part(parameter) if name in trained else None
            if part is not None:
                _put_part(layout.adam, part, value, adam.get(name))
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


def _put_part(adam: torch.optim.Optimizer, part: Part, value: torch.Tensor, saved: AdamState | None) -> None:
    part.master.data.view(-1)[part.at : part.at + part.count].copy_(_span(value, part.start, part.count))
    if saved is None:
        return
    state = adam.state[part.master]
    for moment, read in saved.moments.items():
        held = state.setdefault(moment, torch.zeros_like(part.master))
        held.view(-1)[part.at : part.at + part.count].copy_(_span(read(), part.start, part.count))
    if isinstance(state.get("step"), int):  # DeepSpeed's optimizer on the host counts in plain numbers
        state["step"] = int(saved.step)
    else:
        # Torch's fused kernels want the count beside the weights, its loops on the host.
        device = part.master.device if adam.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.tensor(saved.step, dtype=torch.float32, device=device)


def _span(value: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` values from `start` of the flattened weight; zeros where stage 3 pads it to a multiple of the ranks."""
    flat = value.reshape(-1)[start : start + count]
    return flat if flat.numel() == count else torch.nn.functional.pad(flat, (0, count - flat.numel()))


def _plain_masters(wrapper: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Stage 0: each parameter with the tensor that Adam updates, itself in fp32, a copy in fp32 beside it in bf16."""
    if isinstance(wrapper, torch.optim.Optimizer):
        for group in wrapper.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    for halves, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        yield from zip(halves, masters, strict=True)


def _check_names(model: CadMllm, weights: ShardedWeights, folder: Path) -> None:
    faults = []
    for name, parameter in model.named_parameters():
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        if name not in weights:
            faults.append(f"{name} is missing")
        elif weights.info[name].shape != shape:
            faults.append(f"{name} is {list(weights.info[name].shape)} instead of {list(shape)}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"is of another model: {'; '.join(faults[:5])}{more}",
            where=str(folder),
            hint="Resume with the model section that the run had.",
        )
