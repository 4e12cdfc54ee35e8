"""The loss equals torch's, in one piece and in chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cadtrain.model import loss as loss_module
from cadtrain.model.loss import cross_entropy_sum


@pytest.mark.parametrize("chunk_elements", [1, 64, 1 << 20])
def test_equals_torch_with_its_gradient(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    hidden = torch.randn(13, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 40, (13,), generator=generator)
    ours = cross_entropy_sum(hidden @ weight.T, targets)
    theirs = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    left = torch.autograd.grad(ours * 0.3, (weight, hidden))
    right = torch.autograd.grad(theirs * 0.3, (weight, hidden))
    for mine, expected in zip(left, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_left_alone_without_autograd() -> None:
    logits = torch.randn(5, 7)
    before = logits.clone()
    with torch.no_grad():
        cross_entropy_sum(logits, torch.arange(5))
    assert torch.equal(logits, before)


def test_no_targets_give_zero_with_a_graph() -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    loss = cross_entropy_sum(logits * 1, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
