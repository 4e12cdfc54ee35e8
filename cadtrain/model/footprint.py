"""What a forward and a backward pass hold in memory, found by running the model itself on the meta device.

Legend: T tokens of the pack, K targets, S sequences, V views, C clouds, P points, H query heads, E head width.

Meta tensors have shapes and no values, so the real modules, adapters and loss run at any size in milliseconds, and
every tensor that autograd keeps is seen: there is no second description of the model that could disagree with it. Three
things differ by device and are stood in for: fused attention kernels (their saved tensors: query, key, value, output, and
the fp32 log-sum-exp of each row; Source: Dao, arXiv 2307.08691), the operations of `model.kernels`, and the mask of
dropout, one byte an element on CUDA.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from cadtrain.cad.codec import added_vocabulary
from cadtrain.config.sections import ModelConfig
from cadtrain.model.attention import NAME
from cadtrain.model.build import build_model
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.kernels import FusedOps, installed, standing_in
from cadtrain.model.language import num_recomputed, set_recompute
from cadtrain.model.layer_stack import Footprint, RecomputeDial, StackTrace
from cadtrain.model.tokenizer import build_tokenizer

Kernels = Literal["cuda", "cpu"]

_NAMES: dict[Kernels, str] = {"cuda": "cadtrain_footprint_cuda", "cpu": "cadtrain_footprint_cpu"}

@dataclass(frozen=True, slots=True)
class PackShape:
    """The sizes of one pack that memory depends on."""

    tokens: int
    """T, placeholders of images and clouds included."""
    targets: int
    """K: positions whose logits are computed."""
    sequences: int
    views: int = 0
    """V; 0 where the stage shows no images."""
    clouds: int = 0
    """C; 0 where the stage shows no clouds."""
    points: int = 2048
    """P, points of a cloud."""
    stored: bool = False
    """Whether stored features are shown in place of views and clouds, so that no encoder runs."""


def meta_model(config: ModelConfig, *, codec: str, element_bytes: int) -> CadMllm:
    """The model of `config` with shapes and no values; reads tokenizer and `config.json` files alone.

    Raises `ConfigError` for a model that cannot be built. `element_bytes` 2 is bf16, 4 fp32.
    """
    return build_model(
        config,
        tokenizer=build_tokenizer(config.language, added_vocabulary(codec)),
        codec=codec,
        codec_version=1,
        dtype=torch.bfloat16 if element_bytes == 2 else torch.float32,
        device="meta",
        seed=0,
    )


def recompute_dial(
    model: CadMllm,
    shape: PackShape,
    *,
    kernels: Kernels = "cuda",
    shares_heads: bool = True,
    fused: bool | None = None,
    learning: Callable[[str], bool] = lambda name: True,
) -> RecomputeDial:
    """What one pack of `shape` holds in `model`, which is on the meta device, for any number of recomputed layers.

    `learning(parameter name)` says which of the trainable parameters learn in the stage. `shares_heads`: whether the
    attention kernel serves several query heads by one key head itself. `fused`: whether liger-kernel will serve a model
    built for it; None asks this machine, and takes it as given where no GPU is. Of a stack of equal decoder layers three
    or four are traced, when a footprint is asked for, and the rest is arithmetic.
    """
    layers = model.language.base_model.layers
    is_fused = (installed() or not torch.cuda.is_available()) if fused is None else fused

    def trace(count: int, recomputed: int) -> StackTrace:
        with _prepared(model, kernels=kernels, shares_heads=shares_heads, learning=learning), ExitStack() as stack:
            if kernels == "cuda" and is_fused:
                stack.enter_context(standing_in(_FUSED))
            model.language.base_model.layers = layers[:count]
            set_recompute(model.language, recomputed)
            try:
                return _trace(model, shape, kernels)
            finally:
                model.language.base_model.layers = layers

    with _prepared(model, kernels=kernels, shares_heads=shares_heads, learning=learning):
        are_equal = _layers_are_equal(layers)
    return RecomputeDial(len(layers), trace, are_equal=are_equal)


def trace_footprint(
    model: CadMllm,
    shape: PackShape,
    *,
    recomputed: int = 0,
    kernels: Kernels = "cuda",
    shares_heads: bool = True,
    fused: bool | None = None,
    learning: Callable[[str], bool] = lambda name: True,
) -> Footprint:
    """As `recompute_dial`, with the first `recomputed` layers recomputed, whatever `model` was built with."""
    dial = recompute_dial(
        model, shape, kernels=kernels, shares_heads=shares_heads, fused=fused, learning=learning
    )
    return dial.footprint(recomputed)


def _layers_are_equal(layers: nn.ModuleList) -> bool:
    def signature(layer: nn.Module) -> list[tuple[str, torch.Size, bool]]:
        return [(name, parameter.shape, parameter.requires_grad) for name, parameter in layer.named_parameters()]

    return all(signature(layer) == signature(layers[0]) for layer in layers)


@contextmanager
def _prepared(
    model: CadMllm, *, kernels: Kernels, shares_heads: bool, learning: Callable[[str], bool]
) -> Iterator[None]:
    """The model with stand-ins for its attention, and gradients dropped as soon as they are made; afterwards as before."""
    AttentionInterface.register(_NAMES[kernels], _attention_for(kernels, shares_heads=shares_heads))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    had_recompute = num_recomputed(model.language)
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for _, p in trainable]
    model.language.config._attn_implementation = _NAMES[kernels]
    for name, parameter in trainable:
        parameter.requires_grad_(learning(name))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for _, parameter in trainable:
            parameter.requires_grad_(True)
        model.language.config._attn_implementation = NAME
        set_recompute(model.language, had_recompute)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _trace(model: CadMllm, shape: PackShape, kernels: Kernels) -> StackTrace:
    inputs = meta_inputs(model, shape)
    layers = len(model.language.base_model.layers)
    ledger = Ledger()
    boundaries: list[dict[str, int]] = []
    with ExitStack() as stack:
        stack.enter_context(watching_parts(model, ledger))
        stack.enter_context(_watching_layers(model, ledger, boundaries))
        stack.enter_context(_KernelStandIns(kernels))
        stack.enter_context(ledger)
        output = model(**inputs)
        assert output.loss_sum is not None
        saved = ledger.held()
        if output.loss_sum.requires_grad:
            ledger.part = "backward"
            output.loss_sum.backward()
    peaks = ledger.peaks
    numbers = range(layers)
    return StackTrace(
        saved=saved, boundaries=tuple(boundaries), before=peaks.get("before", {}), head=peaks.get("head", {}),
        after=peaks.get("after", {}), forward=tuple(peaks.get(("forward", n), {}) for n in numbers),
        backward=tuple(peaks.get(("backward", n), {}) for n in numbers),
    )  # fmt: skip


@contextmanager
def _watching_layers(model: CadMllm, ledger: Ledger, boundaries: list[dict[str, int]]) -> Iterator[None]:
    """While open, `ledger.phase` follows a pass through the decoder layers, and `boundaries` gets what is held ahead of each."""
    layers = model.language.base_model.layers

    def come_out_of(number: int, hidden: torch.Tensor) -> None:
        """`hidden` is what layer `number` made, or -1 what the layers begin with."""
        ledger.enter(("forward", number + 1) if number + 1 < len(layers) else "head")
        if hidden.requires_grad:
            # Called when its gradient is there: the backward pass is about to enter the layer that made it.
            hidden.register_hook(lambda grad: ledger.enter(("backward", number) if number >= 0 else "after"))

    def ahead(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(boundaries) < len(layers):  # else it is a layer that is computed again in the backward pass
            come_out_of(len(boundaries) - 1, args[0] if args else kwargs["hidden_states"])
            boundaries.append(ledger.held())

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        if ledger.phase == ("forward", len(layers) - 1):
            come_out_of(len(layers) - 1, output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(ahead, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(behind))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def meta_inputs(model: CadMllm, shape: PackShape) -> dict[str, Any]:
    """The arguments of `CadMllm.forward` for one pack of `shape`, on the meta device."""

    def ids(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    inputs: dict[str, Any] = {
        "input_ids": ids(shape.tokens),
        "position_ids": ids(shape.tokens),
        "cu_seqlens": ids(shape.sequences + 1, torch.int32),
        "max_seqlen": -(-shape.tokens // max(1, shape.sequences)),
        "labels": ids(shape.tokens),
        "target_positions": ids(shape.targets),
    }
    dtype = model.language.dtype
    image, point = model.image_encoder, model.point_encoder
    if shape.views and image is not None:
        if shape.stored:
            inputs["image_features"] = torch.empty(
                shape.views, image.num_tokens, image.width, dtype=dtype, device="meta"
            )
        else:
            inputs["pixel_values"] = torch.empty(shape.views, 3, image.image_size, image.image_size, device="meta")
        inputs["image_positions"] = ids(shape.views * image.num_tokens)
    if shape.clouds and point is not None:
        if shape.stored:
            inputs["point_features"] = torch.empty(
                shape.clouds, point.num_tokens, point.width, dtype=dtype, device="meta"
            )
        else:
            inputs["points"] = torch.empty(shape.clouds, shape.points, 6, device="meta")
        inputs["point_positions"] = ids(shape.clouds * point.num_tokens)
    return inputs


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage from its making to its end, by the part of the model that made it.

    `peaks` says what was held at the worst moment of each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "other"
        self.peaks: dict[Hashable, dict[str, int]] = {}
        self.phase: Hashable = "before"
        self._held: Counter[str] = Counter()
        self._total = 0
        self._most = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def held(self) -> dict[str, int]:
        """Bytes held now, by part."""
        return {part: count for part, count in self._held.items() if count}

    @property
    def peak(self) -> dict[str, int]:
        """What was held at the worst moment of the present phase."""
        return self.peaks.get(self.phase, {})

    def reset_peak(self) -> None:
        """Let `peak` begin anew with what is held now."""
        self.enter(self.phase)

    def enter(self, phase: Hashable) -> None:
        """Begin `phase` with what is held now."""
        self.phase, self._most = phase, self._total
        self.peaks[phase] = self.held()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(t.untyped_storage()) for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in inputs and storage not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        part, count = self.part, storage.nbytes()
        self._known[storage] = None
        self._held[part] += count
        self._total += count
        weakref.finalize(storage, self._remove, part, count)
        if self._total > self._most:
            self._most, self.peaks[self.phase] = self._total, self.held()

    def _remove(self, part: str, count: int) -> None:
        self._held[part] -= count
        self._total -= count


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)


@contextmanager
def watching_parts(model: CadMllm, ledger: Ledger) -> Iterator[None]:
    """While open, `ledger.part` names the part of `model` that is at work."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        part = part_of(name)
        if part is None:
            continue
        before: list[str] = []

        def enter(module: nn.Module, args: Any, *, part: str = part, before: list[str] = before) -> None:
            before.append(ledger.part)
            ledger.part = part

        def leave(module: nn.Module, args: Any, output: Any, *, before: list[str] = before) -> None:
            ledger.part = before.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_PARTS: tuple[tuple[str, str], ...] = (
    (".lora_", "LoRA"), ("norm", "norms"), (".self_attn", "attention"), (".mlp", "MLP"), ("rotary", "rotary"),
    ("lm_head", "logits and loss"), ("embed_tokens", "embedding"),
)  # fmt: skip


def part_of(name: str) -> str | None:
    """The part that the module called `name` belongs to, for a breakdown; None where its parent's part holds."""
    head, _, rest = name.partition(".")
    if head == "":
        return "logits and loss"
    if head != "language":
        return head.replace("_", " ") if not rest else None
    if rest.count(".") == 2 and rest.split(".")[-2] == "layers":
        return "residual stream"
    for mark, part in _PARTS:
        if mark == "norm" and mark in rest.rpartition(".")[2]:
            return part
        if mark != "norm" and mark in f".{rest}":
            return part
    return None


class _KernelStandIns(TorchFunctionMode):
    """Stands in for scaled dot product attention and dropout as the kernels of a device would run them."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], 2, self._kernels)
        if func is functional.dropout and self._kernels == "cuda":
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention_for(kernels: Kernels, *, shares_heads: bool) -> Callable[..., tuple[torch.Tensor, None]]:
    """The saved tensors of `cadtrain_packed` on a device."""

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if kernels == "cpu":
            out: torch.Tensor = _FusedAttention.apply(query, key, value, 2, kernels)
            # Sequence by sequence, then joined: both are kept.
            return torch.cat([out], dim=2).transpose(1, 2), None
        rows = [states[0].transpose(0, 1) for states in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not shares_heads:
            rows[1:] = [states.repeat_interleave(groups, dim=1) for states in rows[1:]]
        packed: torch.Tensor = _FusedAttention.apply(*rows, 0, kernels)
        return packed[None], None

    return attend


class _FusedAttention(torch.autograd.Function):
    """Shapes of a flash-attention kernel: queries [..., H, E] with rows in dimension `row_dim`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row_dim: int, kernels: Kernels
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, _, lse = ctx.saved_tensors
        # Kept until this returns, like the kernel's own workspace: fp32 sums of the query's gradient, one row sum a
        # query, and gradients of keys and values for every query head before they are joined (FlashAttention-2).
        workspace = [query.new_empty(query.shape, dtype=torch.float32), torch.empty_like(lse)]
        heads_dim = 1  # rows lie before heads in a pack and behind them elsewhere: [T, H, E], [S, H, T, E]
        if key.shape[heads_dim] != query.shape[heads_dim]:
            workspace += [torch.empty_like(query), torch.empty_like(query)]
        result = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
        del workspace
        return result


class _NormStandIn(torch.autograd.Function):
    """Liger's norm keeps its input and one fp32 number a row, and its gradient takes over the memory of the one behind it."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        ctx.save_for_backward(states, weight, states.new_empty(states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        _, weight, _ = ctx.saved_tensors
        return grad_outputs[0], torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


class _GateStandIn(torch.autograd.Function):
    """Liger's gated product keeps both its inputs and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return gate, up


def _rotary_stand_in(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Liger's rotary embedding turns both in place."""
    return query.view_as(query), key.view_as(key)


_FUSED = FusedOps(_NormStandIn.apply, _GateStandIn.apply, _rotary_stand_in)
