"""The loss equals torch's, in one piece and in chunks, over logits and over hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from cadtrain.model import loss as loss_module
from cadtrain.model.loss import cross_entropy_sum, head_loss, linear_cross_entropy_sum, prepare_head


def _inputs(count: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    hidden = torch.randn(count, 8, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, 40, (count,), generator=generator)


def _assert_same(ours: torch.Tensor, theirs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    left = torch.autograd.grad(ours * 0.3, inputs)
    right = torch.autograd.grad(theirs * 0.3, inputs)
    for mine, expected in zip(left, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_elements", [1, 64, 1 << 20])
def test_equals_torch_with_its_gradient(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets = _inputs()
    ours = cross_entropy_sum(hidden @ weight.T, targets)
    theirs = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    _assert_same(ours, theirs, (weight, hidden))


@pytest.mark.parametrize("chunk_logits", [1, 200, 1 << 20])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 20])
def test_over_hidden_states_equals_torch(
    chunk_logits: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets = _inputs()
    ours = linear_cross_entropy_sum(hidden, weight, targets)
    theirs = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    _assert_same(ours, theirs, (weight, hidden))


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_what_takes_no_gradient_is_given_none(learns: str) -> None:
    hidden, weight, targets = _inputs()
    (weight if learns == "hidden" else hidden).requires_grad_(False)
    learning = hidden if learns == "hidden" else weight
    ours = linear_cross_entropy_sum(hidden, weight, targets)
    theirs = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    _assert_same(ours, theirs, (learning,))


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 80)
    made: list[torch.Size] = []
    inner = loss_module._loss_over_logits

    def watched(logits: torch.Tensor, targets: torch.Tensor, *, with_gradient: bool) -> torch.Tensor:
        made.append(logits.shape)
        return inner(logits, targets, with_gradient=with_gradient)

    monkeypatch.setattr(loss_module, "_loss_over_logits", watched)
    linear_cross_entropy_sum(*_inputs())
    assert made == [torch.Size([2, 40])] * 6 + [torch.Size([1, 40])]


def test_a_prepared_head_gives_logits_and_loss() -> None:
    head = nn.Linear(8, 40, bias=False)
    hidden, _, targets = _inputs()
    logits, before = head(hidden), head_loss(head, hidden, targets)
    prepare_head(head)
    assert torch.equal(head(hidden), logits)
    torch.testing.assert_close(head_loss(head, hidden, targets), before)
    assert list(head.state_dict()) == ["weight"]


def test_a_head_with_a_bias_keeps_its_own_way() -> None:
    head = nn.Linear(8, 40)
    hidden, _, targets = _inputs()
    prepare_head(head)
    expected = functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(head_loss(head, hidden, targets), expected)


def test_logits_are_left_alone_without_autograd() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    before = logits.detach().clone()
    with torch.no_grad():
        cross_entropy_sum(logits, torch.arange(5))
    assert torch.equal(logits.detach(), before)


def test_no_targets_give_zero_with_a_graph() -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    loss = cross_entropy_sum(logits * 1, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None


def test_no_targets_give_zero_gradients_over_hidden_states() -> None:
    hidden, weight, targets = _inputs(0)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    assert loss.item() == 0
    loss.backward()
    assert weight.grad is not None
    assert not weight.grad.any()
