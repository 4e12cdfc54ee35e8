"""How weights come into being: where they live while a model is built, and their values from one seed.

Legend: none; everything here works on whole modules.

Every module draws its values from a generator seeded by the run's seed and the module's own name. So the values do not
depend on the number of ranks, on which other parts the model has, on LoRA, or on whether the weights are shared out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

BASE_LAYER = ".base_layer"
ADAPTERS = (".lora_", ".added_rows.")
"""What the names of weights that stand beside frozen ones hold: low-rank adapters, and rows of added tokens."""


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of one weight, to be written in place."""

    held: torch.Tensor
    """What the rank keeps: a flat tensor, which may be longer than the rest of the weight from `start` on."""
    start: int
    """The value of the flattened weight that `held` begins with; behind the last one where this rank has only padding."""


class Sharding(Protocol):
    """How the language model's weights are shared out between ranks while the model is built (ZeRO-3).

    With DeepSpeed: `construct` is `zero.Init`, `gather` is `GatheredParameters(..., modifier_rank=0)`, `share` is the
    parameter's `ds_tensor`.
    """

    is_source: bool
    """Whether what this rank writes into a gathered weight is what all ranks keep."""

    def construct(self) -> AbstractContextManager[object]:
        """Context in which modules are made; on leaving a module's constructor its weights may be shared out."""

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Context in which `parameters` are whole; on leaving, the source rank's values are kept. All ranks enter it."""

    def share(self, parameter: nn.Parameter) -> Share | None:
        """What this rank keeps of `parameter`; None on all ranks where only `gather` can set it. No collective."""


class WholeWeights:
    """Every rank holds every weight: the quiet twin of a real sharding."""

    is_source = True

    def construct(self) -> AbstractContextManager[object]:
        return nullcontext()

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        return nullcontext()

    def share(self, parameter: nn.Parameter) -> Share | None:
        return Share(parameter.data.view(-1), 0) if parameter.is_contiguous() else None


@contextmanager
def building(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """New tensors are of `dtype` and on `device`; inside `torch.device("meta")` they stay on meta."""
    target = torch.device("meta") if torch.get_default_device().type == "meta" else torch.device(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with target:
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, *, seed: int, sharding: Sharding, loaded: Collection[str] = ()) -> None:
    """Give every weight of `model` its first value, except in the submodules named in `loaded`,
    of which only the adapters are new.

    Values follow each part's own rule (`_init_weights` of the nearest transformers model around it); adapters start as
    peft starts them, with a product of zero, and so do the differences of added rows.
    """
    for name, module, owner in _walk(model, "", model):
        if not is_adapter(name) and any(name == part or name.startswith(part + ".") for part in loaded):
            continue
        parameters = list(module.parameters(recurse=False))
        if not parameters or parameters[0].is_meta:
            continue
        # Adapters and all other parts are whole on every rank, and drawn there.
        holder = sharding if name.startswith("language.") and not is_adapter(name) else WholeWeights()
        with holder.gather(parameters):
            if holder.is_source:
                devices = {parameter.device for parameter in parameters if parameter.is_cuda}
                with torch.random.fork_rng(devices=list(devices)):
                    torch.manual_seed(seed_of(seed, name))
                    _initialize(name, module, owner)


def restore_rotary(model: nn.Module) -> None:
    """Bring every rotary embedding's frequencies back to their fp32 values.

    ZeRO-3's construction context casts buffers to the training type; in bf16 the positions past a few hundred would
    fall together.
    """
    for _, module, owner in _walk(model, "", model):
        names = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and not buffer.is_meta
        ]
        if not names or not isinstance(owner, PreTrainedModel):
            continue
        for name in names:
            setattr(module, name, getattr(module, name).float())
        owner._init_weights(module)


def _walk(module: nn.Module, name: str, owner: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module, nearest transformers model around it), parents before children, tied modules once."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    yield name, module, owner
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, owner)


def is_adapter(name: str) -> bool:
    """Whether `name`, of a weight or its module, is that of something that stands beside a frozen weight."""
    return any(mark in f"{name}." for mark in ADAPTERS)


def _initialize(name: str, module: nn.Module, owner: nn.Module) -> None:
    if ".lora_A." in name and isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, a=5**0.5)
    elif ".lora_B." in name and isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif is_adapter(name):
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
    else:
        owner._init_weights(module)  # type: ignore[operator]


def seed_of(seed: int, name: str) -> int:
    """The seed of what is called `name` in a run with `seed`; the same with and without adapters."""
    digest = hashlib.sha256(f"{seed}:{name.replace(BASE_LAYER, '')}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
