"""Rows that an added vocabulary brings to a language model: their first values, and how they learn beside adapters.

Legend: V vocabulary, R rows from the first added token to the end, D width, T tokens.

Without adapters the whole embedding learns and nothing here runs but `start_new_rows`. Under adapters the pretrained
rows stay frozen, and the R last ones learn as a difference that starts at zero: R x D values instead of V x D, whose
optimizer state would outweigh the adapters'. The difference lives in modules of its own that run in every pass, whatever
tokens it holds, so ZeRO-3 meets the same modules in the same order on every rank; a merge adds it to the base.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from cadtrain.errors import ConfigError, Fault
from cadtrain.model.weights import Sharding, seed_of

ROWS_MULTIPLE = 64
"""A vocabulary that has to grow grows to a multiple of this, which matrix units like."""
SPREAD = 0.1
"""How far new rows lie from the mean of the old ones, in standard deviations of these: no two tokens start alike."""


class AddedRowsEmbedding(nn.Module):
    """An embedding [V, D] whose last R rows learn as a difference."""

    def __init__(self, base: nn.Embedding, first: int, num_rows: int) -> None:
        super().__init__()
        self.base_layer = base
        self.added_rows = nn.Embedding(num_rows, base.embedding_dim)
        self.first = first

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., D] of int64[...] ids."""
        places = input_ids - self.first
        is_new = (places >= 0).unsqueeze(-1)
        base: torch.Tensor = self.base_layer(input_ids)
        return base + self.added_rows(places.clamp(min=0)) * is_new


class AddedRowsHead(nn.Module):
    """A head [V, D] whose last R rows learn as a difference, shared with the embedding's where the two are tied."""

    def __init__(self, base: nn.Linear, first: int, num_rows: int, tied_to: AddedRowsEmbedding | None) -> None:
        super().__init__()
        self.base_layer = base
        self.added_rows = nn.Linear(base.in_features, num_rows, bias=False)
        if tied_to is not None:
            self.added_rows.weight = tied_to.added_rows.weight
        self.first = first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of hidden states [T, D]."""
        logits: torch.Tensor = self.base_layer(hidden)
        # In place: a second copy of the logits would be the largest tensor of the step.
        logits[..., self.first :] += self.added_rows(hidden)
        return logits


def add_rows(model: PreTrainedModel, first: int) -> None:
    """Let the rows from token `first` on learn in a `model` whose embeddings are frozen, in place.

    The values of the differences come from `initialize_weights`. Raises ConfigError for embeddings that do more than
    look up a row, and for a head that is no plain linear layer: a difference added to them could not be merged.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        hint = "Use `data.codec: compact`, or train all weights (`lora: null`)."
        message = f"added tokens cannot be trained beside adapters on embeddings of kind {kinds}."
        raise ConfigError([Fault("model.language.lora", message, hint)])
    num_rows = int(model.config.vocab_size) - first
    is_tied = head.weight is embedding.weight
    wrapped = AddedRowsEmbedding(embedding, first, num_rows)
    model.set_input_embeddings(wrapped)
    model.set_output_embeddings(AddedRowsHead(head, first, num_rows, wrapped if is_tied else None))


@torch.no_grad()
def start_new_rows(model: PreTrainedModel, first: int, *, seed: int, sharding: Sharding) -> None:
    """Give the rows from token `first` on their first values: near the mean of the rows before them.

    All ranks call this. Logits of tokens near the mean leave the pretrained distribution nearly as it was (Source:
    Hewitt, "Initializing new word embeddings for pretrained language models", 2021). Rows that the pretrained weights
    had to spare are overwritten as well.
    """
    done: set[int] = set()
    for name, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        parameters = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in done]
        done |= {id(parameter) for parameter in parameters}
        if not parameters or parameters[0].is_meta:
            continue
        with sharding.gather(parameters):
            if sharding.is_source:
                for parameter in parameters:
                    _start(parameter, first, seed_of(seed, f"new rows of the {name}"))


def _start(parameter: torch.Tensor, first: int, seed: int) -> None:
    """Fill `parameter` [V, ...] from row `first` on; a bias has no spread."""
    old, new = parameter[:first], parameter[first:]
    values = old.mean(dim=0, keepdim=True, dtype=torch.float32).expand(new.shape)
    if parameter.dim() == 2:
        noise = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed)).to(new.device)
        values = values + SPREAD * old.std(dim=0, keepdim=True).float() * noise
    new.copy_(values)
