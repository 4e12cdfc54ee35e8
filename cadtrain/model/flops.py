"""How many floating point operations a pack costs a model, counted from its own modules: what MFU is measured against.

Legend: T tokens, K targets, V views, C clouds, H query heads, E head width, n tokens of one sequence.

Counted is what the mathematics of a training step needs, a multiplication and an addition as 2:

- a weight matrix costs 2 an element and row forward, 2 for the gradient of its input where that is needed, and 2 for its
  own where it learns: 6 in all where everything learns, 4 in a frozen decoder under adapters, 2 in a frozen encoder;
- the head works on the K targets and not on all T tokens;
- causal attention needs half of the n x n pairs of a sequence: n²/2, at 4 E H a pair forward and twice that backward.

Not counted: embeddings (they look up), norms, activations, softmax, rotations, the loss, the optimizer, anything that is done
twice (recomputation, an attention kernel's second look at its scores), and the dummies that keep ranks in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cadtrain.config.sections import Component
from cadtrain.errors import UsageError
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.components import component_of
from cadtrain.model.encoders.image import ImageEncoder
from cadtrain.model.encoders.point import PointEncoder


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one unit: one token, target, pair, view or cloud."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> Work:
        return Work(self.forward * count, self.backward * count)


@dataclass(frozen=True, slots=True)
class PackContent:
    """What one or more packs hold, as far as work depends on it; contents of packs add up."""

    tokens: int = 0
    """T, placeholders of images and clouds included."""
    targets: int = 0
    """K: positions whose logits are computed."""
    pairs: float = 0.0
    """Sum of n²/2 over the sequences."""
    views: int = 0
    clouds: int = 0
    sequences: int = 0

    def __add__(self, other: PackContent) -> PackContent:
        return PackContent(
            self.tokens + other.tokens, self.targets + other.targets, self.pairs + other.pairs, self.views + other.views,
            self.clouds + other.clouds, self.sequences + other.sequences,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """The work of each unit that a pack is made of."""

    token: Work
    """The decoder layers' matrices, of one token."""
    target: Work
    """The head, of one target position."""
    pair: Work
    """The decoder's attention, of one pair of positions."""
    view: Work
    """Image encoder and projector, of one view."""
    cloud: Work
    """Point encoder and projector, of one cloud."""

    def of(self, content: PackContent) -> Work:
        """The work of what `content` holds."""
        return (
            self.token * content.tokens
            + self.target * content.targets
            + self.pair * content.pairs
            + self.view * content.views
            + self.cloud * content.clouds
        )


def count_flops(model: CadMllm, learning: Iterable[Component], *, num_points: int, stored: bool = False) -> ModelFlops:
    """The work of `model`, which is on the meta device, in a stage in which the components `learning` learn and a cloud has
    `num_points` points. `stored`: features of views and clouds are read, so that only projectors work on them.

    Leaves `requires_grad` of the model's parameters as that stage has it. Raises `UsageError` for a decoder whose layers have
    matrices outside of linear layers (a mixture of experts), of which it is not known how many rows each sees.
    """
    wanted = set(learning)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and component_of(name) in wanted)
    head = model.language.get_output_embeddings()
    layers = model.language.base_model.layers
    _refuse_other_matrices(layers)
    heads, width = _attention_width(model.language.config)
    pair = Work(2.0, 4.0) * (heads * width) * len(layers)
    view, cloud = _of_one_view(model, stored), _of_one_cloud(model, num_points, stored)
    return ModelFlops(_matrices(layers), _matrices(head), pair, view, cloud)


def _matrices(module: nn.Module) -> Work:
    """One row through all linear layers of `module`. A gradient flows on to every input: the decoder's embeddings take one,
    because what they come from learns or because ZeRO-3 needs it."""
    work = Work()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            size = layer.weight.numel()
            work += Work(2.0 * size, 2.0 * size + 2.0 * size * layer.weight.requires_grad)
    return work


def _refuse_other_matrices(layers: nn.ModuleList) -> None:
    known = {id(layer.weight) for layer in layers.modules() if isinstance(layer, nn.Linear)}
    other = [name for name, p in layers[0].named_parameters() if p.dim() >= 2 and id(p) not in known]
    if other:
        raise UsageError(
            f"operations cannot be counted: decoder layers hold matrices outside of linear layers ({', '.join(other[:3])})",
            where="model.language",
        )


def _attention_width(config: Any) -> tuple[int, int]:
    """Query heads H, and the sum of the widths of a key head and a value head (2 E where they are alike)."""
    heads = int(config.num_attention_heads)
    plain = getattr(config, "head_dim", None) or config.hidden_size // heads
    key, value = (getattr(config, name, None) or plain for name in ("qk_head_dim", "v_head_dim"))
    return heads, int(key) + int(value)


def _of_one_view(model: CadMllm, stored: bool) -> Work:
    encoder = model.image_encoder
    if encoder is None:
        return Work()
    side = encoder.image_size
    views = torch.empty(1, 3, side, side, device="meta")
    with _counting(model) as found:
        assert model.image_projector is not None
        model.image_projector(_features(encoder) if stored else encoder(views))
    return found[0]


def _of_one_cloud(model: CadMllm, num_points: int, stored: bool) -> Work:
    encoder = model.point_encoder
    if encoder is None:
        return Work()
    points = torch.empty(1, num_points, 6, device="meta")
    with _counting(model) as found:
        assert model.point_projector is not None
        model.point_projector(_features(encoder) if stored else encoder(points))
    return found[0]


def _features(encoder: ImageEncoder | PointEncoder) -> torch.Tensor:
    """What was stored of one view or cloud, on the meta device."""
    return torch.empty(1, encoder.num_tokens, encoder.width, dtype=next(encoder.parameters()).dtype, device="meta")


@contextmanager
def _counting(model: CadMllm) -> Iterator[list[Work]]:
    """Add up in a list of one the work of every linear layer, convolution and attention that runs, as autograd sees it:
    which inputs take a gradient, which weights learn, and whether anything is recorded at all."""
    found = [Work()]

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module.weight, torch.Tensor)
        rows = output.numel() // module.weight.shape[0]
        size = 2.0 * rows * module.weight.numel()
        gradients = (inputs[0].requires_grad + module.weight.requires_grad) if torch.is_grad_enabled() else 0
        found[0] += Work(size, size * gradients)

    hooks = [
        module.register_forward_hook(see) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.enable_grad(), _AttentionCount(found):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


class _AttentionCount(TorchFunctionMode):
    """Adds the work of full scaled dot product attention to a list of one."""

    def __init__(self, found: list[Work]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value = (
                args[:3] if len(args) >= 3 else ((kwargs or {})[name] for name in ("query", "key", "value"))
            )
            pairs = query.numel() // query.shape[-1] * key.shape[-2]
            work = 2.0 * pairs * (query.shape[-1] + value.shape[-1])
            records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
            self._found[0] += Work(work, 2.0 * work * records)
        return func(*args, **(kwargs or {}))
