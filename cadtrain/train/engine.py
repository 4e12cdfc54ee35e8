"""The place that knows DeepSpeed (with `shards`, its way to the disk): one engine per run, whatever the curriculum does.

`Engine` is what the loop needs; `DeepSpeedEngine` gives it with ZeRO 0 to 3. Each component of the model is a
parameter group (two: with and without weight decay), so a stage is a set of rates and never a new engine.

Gradients: the loss of a micro-step is `sum over its targets × world_size / global target count`; DeepSpeed
averages over ranks, so the sum over micro-steps and ranks is the gradient of the mean over all target tokens.
Accumulation is in fp32 at every stage; at ZeRO-0 in bf16, where DeepSpeed has none, it is done here.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from cadtrain.checkpoint.shard_writer import ShardSink
from cadtrain.checkpoint.weight_sums import sums_name, sums_of
from cadtrain.config.sections import Component, OptimConfig
from cadtrain.data.collate import Pack
from cadtrain.distributed import all_agree, first_verdict
from cadtrain.errors import CheckpointError
from cadtrain.gpu_memory import allocator_share
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.components import (
    decay_parameters,
    decoder_layer_classes,
    encoder_block_classes,
    trainable_components,
)
from cadtrain.model.language import set_recompute
from cadtrain.model.weights import Share
from cadtrain.train.grad_norm import take_norms_at_once
from cadtrain.train.lean_zero3 import lighten
from cadtrain.train.live_weights import live_spans
from cadtrain.train.reshard import Layout, load_resharded
from cadtrain.train.shards import safe_checkpoint_engine

log = logging.getLogger(__name__)

COLLECTIVE_LIMIT = timedelta(minutes=30)
"""How long a rank waits for its peers: longer than a large checkpoint takes to be hashed, shorter than a night."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: float
    """Norm of the global gradient before clipping; inf or nan where the step was skipped."""
    was_applied: bool


class Engine(Protocol):
    """What the training loop needs of an engine. Every method must be called by all ranks."""

    device: torch.device

    def set_learning(self, components: Iterable[Component]) -> None:
        """Let these components take gradients and no others."""
        ...

    def set_recompute(self, num_layers: int) -> None:
        """Compute so many decoder layers again in the backward pass; between steps."""
        ...

    def start_components(self, components: Iterable[Component]) -> None:
        """Begin these components' optimizer state anew (moments 0, Adam's step count 0)."""
        ...

    def set_rates(self, rates: Mapping[Component, float]) -> None:
        """Set each component's learning rate."""
        ...

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        """Forward and backward of one pack; the pack's loss sum (float32 scalar, detached)."""
        ...

    def step(self) -> StepResult:
        """Clip, update the weights, clear the gradients."""
        ...

    def evaluate(self, pack: Pack) -> torch.Tensor:
        """The pack's loss sum without gradients, in eval mode."""
        ...

    def frozen_names(self) -> frozenset[str]:
        """Names of the weights that never learn in this run."""
        ...

    def saved_bytes(self, *, with_frozen: bool = True) -> int:
        """About what a save of all ranks takes on the disk."""
        ...

    def save(self, folder: Path, sink: ShardSink) -> None:
        """Hand this rank's share of the state to `sink`, shard by shard, under names below `folder`; raises what the sink raises."""
        ...

    def load(self, folder: Path) -> None:
        """Read this rank's share of the state from `folder`; raises `CheckpointError`."""
        ...

    def load_resharded(self, folder: Path) -> None:
        """Read this rank's share from shards of another ZeRO stage or number of ranks; raises `CheckpointError`."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Read weights and buffers alone from shards of any layout; raises `CheckpointError`."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def init_process_group() -> torch.device:
    """Join the process group and return this rank's device. Call once a process, on every rank, before `DeepSpeedEngine`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        share = allocator_share(torch.cuda.get_device_properties(local_rank).total_memory)
        if share is not None:
            torch.cuda.set_per_process_memory_fraction(share, local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    import deepspeed

    _send_deepspeed_log_to_file()
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory reduction for half a minute at the first start; only inference calls it.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_LIMIT)
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def leave_process_group() -> None:
    """Take this rank out of the process group, so that the interpreter ends without warnings."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class ZeroSharding:
    """Shares the language model's weights out between ranks while they are made (ZeRO-3), so no rank holds them all.

    The process group must be up, else DeepSpeed would quietly share them out to one rank.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        import torch.distributed as dist

        self._config = config
        self.is_source = dist.get_rank() == 0

    @contextmanager
    def construct(self) -> Iterator[None]:
        import deepspeed

        context: Any = deepspeed.zero.Init(config_dict_or_path=self._config)

        def share_out(parameter: torch.nn.Parameter) -> None:
            context._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

        # DeepSpeed's own sends every weight from rank 0 to all before it keeps a part of it. Ours have no values yet when
        # they are made: they are read or drawn afterwards, so a whole model would be sent for nothing.
        if hasattr(context, "_zero_init_param"):
            context._zero_init_param = share_out
        with context:
            yield
        gc.collect()  # the own weight of a head that is tied to the embedding: only a ring of DeepSpeed's closures holds it

    def gather(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[object]:
        import deepspeed

        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context

    def share(self, parameter: torch.nn.Parameter) -> Share | None:
        """The N-th part of `parameter` that this rank keeps; None where DeepSpeed keeps it in another form.

        Those forms: on NVMe, quantized, in a second copy per group of ranks (hpZ), and whole because it is gathered just now.
        """
        held: Any = getattr(parameter, "ds_tensor", None)
        if (
            held is None
            or held.final_location is not None
            or held.status.name != "AVAILABLE"
            or hasattr(held, "ds_quant_scale")
            or getattr(parameter, "ds_secondary_tensor", None) is not None
            or parameter.ds_status.name != "NOT_AVAILABLE"  # type: ignore[attr-defined]
        ):
            return None
        rank = int(parameter.ds_zero_partition_rank)  # type: ignore[attr-defined]
        return Share(held.data.view(-1), rank * held.numel())


class DeepSpeedEngine:
    """`Engine` over DeepSpeed ZeRO 0 to 3."""

    def __init__(self, model: CadMllm, *, config: dict[str, Any], optim: OptimConfig, device: torch.device) -> None:
        """Wrap `model`, which is on `device` in the precision that it trains in. `config` is a complete DeepSpeed configuration. Collective."""
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        self.device = device
        self.model = model
        self._stage = int(config["zero_optimization"]["stage"])
        self._trainable = {name: [p for _, p in rows] for name, rows in trainable_components(model).items()}
        self._frozen_names = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        if self._stage == 3:
            set_z3_leaf_modules(model, [*decoder_layer_classes(model), *encoder_block_classes(model)])
        offload = config["zero_optimization"].get("offload_optimizer") or {}
        optimizer = _adamw(_parameter_groups(model), optim, device, on_host=offload.get("device", "none") != "none")
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        _send_deepspeed_log_to_file()
        self._engine.checkpoint_engine = safe_checkpoint_engine()
        if self._stage == 3:
            lighten(model.language.base_model.layers)
        if device.type == "cuda" and self._stage > 0:
            take_norms_at_once(self._engine.optimizer, self._stage)
        self._world_size = self._engine.world_size
        self._optim = optim
        self._constant_hashes: dict[tuple[str, int, int], str] = {}
        self._fp32_sums: dict[torch.nn.Parameter, torch.Tensor] | None = None
        self._has_evaluation_trace = False
        if self._stage == 0:
            # DeepSpeed's plain data parallelism accumulates in the weights' dtype; ours adds up in fp32 and reduces once.
            self._engine.enable_backward_allreduce = False
            self._fp32_sums = {}
        model.train()

    def set_learning(self, components: Iterable[Component]) -> None:
        wanted = set(components)
        self._forget_trace()
        for component, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(component in wanted)
        # With offload the gradient of the last step stays in host memory; at rest it would go on feeding the moments.
        for component, tensor in self._optimizer_tensors():
            if component not in wanted and tensor.grad is not None:
                tensor.grad.zero_()

    def set_recompute(self, num_layers: int) -> None:
        self._forget_trace()
        set_recompute(self.model.language, num_layers)

    def start_components(self, components: Iterable[Component]) -> None:
        wanted = set(components)
        state = self._inner_optimizer().state
        for component, tensor in self._optimizer_tensors():
            for key, value in state.get(tensor, {}).items() if component in wanted else ():
                state[tensor][key] = value.zero_() if isinstance(value, torch.Tensor) else type(value)(0)

    def set_rates(self, rates: Mapping[Component, float]) -> None:
        for group in self._inner_optimizer().param_groups:
            group["lr"] = rates[group["component"]]

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        if self._has_evaluation_trace:
            self._forget_trace()
        self._engine.set_gradient_accumulation_boundary(is_last)
        output = self._engine(**pack.to(self.device).model_inputs())
        self._engine.backward(output.loss_sum * (self._world_size / num_targets), scale_wrt_gas=False)
        if self._fp32_sums is not None:
            self._add_up_fp32(is_last)
        return output.loss_sum.detach()

    def step(self) -> StepResult:
        norm = self._plain_grad_norm() if self._stage == 0 else None
        if norm is not None and not torch.isfinite(torch.tensor(norm)):
            self._engine.zero_grad()
            return StepResult(norm, was_applied=False)
        self._engine.step()
        if norm is None:
            found = self._engine.get_global_grad_norm()
            norm = float("nan") if found is None else float(found)
        was_applied = bool(self._engine.was_step_applied())
        if not was_applied:
            self._drop_accumulated()
        return StepResult(norm, was_applied)

    def evaluate(self, pack: Pack) -> torch.Tensor:
        coordinator = self._param_coordinator()
        if coordinator is not None and coordinator.is_invalid_trace():
            self._has_evaluation_trace = True
        self._engine.eval()
        with torch.no_grad():
            output = self._engine(**pack.to(self.device).model_inputs())
        self._engine.train()
        return output.loss_sum.detach()

    def frozen_names(self) -> frozenset[str]:
        return self._frozen_names

    def saved_bytes(self, *, with_frozen: bool = True) -> int:
        learning = {id(parameter) for rows in self._trainable.values() for parameter in rows}
        total = sum(buffer.nbytes for buffer in self.model.buffers())
        for parameter in self.model.parameters():
            numel, learns = int(getattr(parameter, "ds_numel", parameter.numel())), id(parameter) in learning
            # fp32 weight and two moments; beside them the training weights, which ZeRO-3 writes for frozen ones only.
            total += 12 * numel if learns else 0
            if (not learns and with_frozen) or (learns and self._stage < 3):
                total += numel * parameter.element_size()
        return total

    def save(self, folder: Path, sink: ShardSink) -> None:
        writer = self._engine.checkpoint_engine
        writer.sink, writer.failure = sink, None
        try:
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        finally:
            writer.sink = None
        if writer.failure is not None:
            raise CheckpointError(
                f"a shard could not be written: {writer.failure}", where=str(folder)
            ) from writer.failure
        layout = Layout(self._engine.optimizer, self._stage, self._engine.global_rank)
        trained = [parameter for rows in self._trainable.values() for parameter in rows]
        spans = live_spans(self.model, layout, trained)
        sink(folder / sums_name(layout.rank), sums_of(spans, self._constant_hashes))

    def load(self, folder: Path) -> None:
        try:
            path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except (OSError, RuntimeError, AssertionError, KeyError, ValueError, EOFError) as error:
            raise CheckpointError(f"DeepSpeed cannot load it: {error}", where=str(folder)) from error
        if path is None:
            raise CheckpointError("DeepSpeed found nothing to load", where=str(folder))
        self._restore_settings()

    def load_resharded(self, folder: Path) -> None:
        self._load_whole(folder, with_adam=True)

    def load_weights(self, folder: Path) -> None:
        self._load_whole(folder, with_adam=False)

    def _load_whole(self, folder: Path, *, with_adam: bool) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = [[names[parameter] for parameter in group["params"]] for group in _parameter_groups(self.model)]
        layout = Layout(self._engine.optimizer, self._stage, self._engine.global_rank)
        verdict = None
        try:
            load_resharded(self.model, layout, groups, folder, with_adam=with_adam)
        except (CheckpointError, OSError) as error:
            verdict = str(error)
        if fault := first_verdict(all_agree(verdict, device=self.device)):
            raise CheckpointError(f"cannot be loaded: {fault}", where=str(folder))
        layout.settle()

    def close(self) -> None:
        self._engine.destroy()

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer, whole and on the host, one at a time; yields on every rank. Collective."""
        import deepspeed

        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach().cpu().clone()
        for name, buffer in self.model.named_buffers():
            yield name, buffer.detach().cpu().clone()

    def _param_coordinator(self) -> Any:
        """What gathers weights ahead of their use under ZeRO-3; None at other stages."""
        return self._engine.optimizer.parameter_offload.get_param_coordinator() if self._stage == 3 else None

    def _forget_trace(self) -> None:
        """Let ZeRO-3 record anew, from the next pass on, in which order modules run: it gathers weights ahead by that.

        It finds out by itself that the order has changed, but amid a pass: then that pass and the next go without.
        """
        self._has_evaluation_trace = False
        coordinator = self._param_coordinator()
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def _drop_accumulated(self) -> None:
        """Forget the gradients of a step that was not applied: with offload DeepSpeed would add the next ones to them."""
        for name in ("averaged_gradients", "all_grad_tensors"):
            held = getattr(self._engine.optimizer, name, None)
            if getattr(self._engine.optimizer, "cpu_offload", False) and isinstance(held, dict):
                for key in held:
                    held[key] = None

    def _restore_settings(self) -> None:
        """Loading brings the checkpoint's betas, decay and clipping back; those of the configuration count."""
        for group in self._inner_optimizer().param_groups:
            group.update(betas=self._optim.betas, eps=self._optim.eps)
            group["weight_decay"] = self._optim.weight_decay if group["decays"] else 0.0
        for name in ("clip_grad", "clip_grad_norm"):
            if isinstance(getattr(self._engine.optimizer, name, None), (int, float)):
                setattr(self._engine.optimizer, name, self._optim.gradient_clipping)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The Adam inside DeepSpeed's wrapper, or the one that it left bare."""
        wrapper = self._engine.optimizer
        return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer

    def _optimizer_tensors(self) -> Iterator[tuple[Component, torch.Tensor]]:
        """Each tensor that Adam keeps state for, with its component."""
        groups = self._inner_optimizer().param_groups
        if self._stage == 3:
            wrapper = self._engine.optimizer
            for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
                yield groups[wrapper.sub_group_to_group_id[number]]["component"], flat
            return
        for group in groups:
            for tensor in group["params"]:
                yield group["component"], tensor

    def _add_up_fp32(self, is_last: bool) -> None:
        """Add this micro-step's gradients to fp32 sums; after the last one hand the sums back and reduce them."""
        assert self._fp32_sums is not None
        for parameters in self._trainable.values():
            for parameter in parameters:
                if parameter.grad is not None:
                    held = self._fp32_sums.get(parameter)
                    self._fp32_sums[parameter] = parameter.grad.float() if held is None else held.add_(parameter.grad)
                    parameter.grad = None
        if not is_last:
            return
        import torch.distributed as dist

        for parameters in self._trainable.values():
            for parameter in parameters:
                if not parameter.requires_grad:
                    # As under ZeRO-1 to 3: at rate 0 it stays as it is, and its moments fade.
                    parameter.grad = torch.zeros_like(parameter)
                    continue
                # Reduced in fp32, and on every rank alike: a rank whose packs never reached a parameter sends zeros.
                total = self._fp32_sums.pop(parameter, None)
                total = torch.zeros_like(parameter, dtype=torch.float32) if total is None else total
                if self._world_size > 1:
                    dist.all_reduce(total)
                parameter.grad = total.div_(self._world_size).to(parameter.dtype)
        self._fp32_sums.clear()

    def _plain_grad_norm(self) -> float:
        grads = [p.grad for rows in self._trainable.values() for p in rows if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads).float())


def _parameter_groups(model: CadMllm) -> list[dict[str, Any]]:
    decayed = decay_parameters(model)
    groups: list[dict[str, Any]] = []
    for component, rows in trainable_components(model).items():
        for decays in (True, False):
            parameters = [parameter for name, parameter in rows if (name in decayed) == decays]
            if parameters:
                groups.append({"params": parameters, "component": component, "decays": decays, "lr": 0.0})
    return groups


def _adamw(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device, *, on_host: bool
) -> torch.optim.Optimizer:
    """AdamW: torch's, fused on CUDA; DeepSpeed's vectorised one where the states of a CUDA run live on the host."""
    for group in groups:
        group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if on_host and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(
        groups, fused=device.type == "cuda", foreach=False if device.type == "cpu" else None, **settings
    )


def _send_deepspeed_log_to_file() -> None:
    """DeepSpeed writes its log to stdout; send it where this rank's log goes."""
    logger = logging.getLogger("DeepSpeed")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
