"""From a stored sample to what the model reads: modality placeholders, prompt, CAD sequence.

Layout of one example, n tokens (DESIGN: `[image][point][instruction + description][CAD sequence][EOS]`):

    input   img img pt pt  I  n  s  t  ... S 1 , 2 ... e
    label    -   -  -  -   -  -  -  -  ... S 1 , 2 ... e EOS      (shifted: what the position must predict)

The prompt and the sequence are tokenized apart and joined as ids, so their border never depends on the
tokenizer's merges, and inference builds the same prompt. EOS is appended as a label; it never replaces a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cadtrain.cad.tokens import without_words
from cadtrain.data.features.store import SplitFeatures
from cadtrain.data.order import draw_points, draw_views
from cadtrain.data.sample import Sample, decode_image
from cadtrain.errors import DataError

IGNORED = -100
"""Label of a position that predicts nothing, as in torch's cross entropy."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that data needs."""

    eos_token_id: int

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Tokenize a list of texts; `["input_ids"]` holds a list of ids for each."""
        ...


@dataclass(frozen=True, slots=True)
class ExampleShape:
    """How many tokens and which arrays a modality brings."""

    tokens_per_view: int
    views: int
    image_size: int
    point_tokens: int
    num_points: int

    def modality_tokens(self, modalities: str) -> int:
        """Placeholder tokens of one example of the modality set."""
        kinds = modalities.split("+")
        return ("image" in kinds) * self.tokens_per_view * self.views + ("point" in kinds) * self.point_tokens


@dataclass(frozen=True, slots=True)
class Example:
    """One sample as the model sees it once. Legend: n tokens, v views, P points, N tokens of a view or cloud, W their width."""

    sample_id: str
    input_ids: np.ndarray
    """int64[n]; placeholders hold the EOS id and are overwritten by features."""
    labels: np.ndarray
    """int64[n], shifted; IGNORED where nothing is predicted."""
    num_image_tokens: int
    num_point_tokens: int
    pixel_values: np.ndarray | None
    """float32[v, 3, H, W] in [0, 1]."""
    points: np.ndarray | None
    """float32[P, 6]: xyz and unit normal."""
    image_features: torch.Tensor | None = None
    """[v, N, W]: in place of `pixel_values`, what the encoder gave for these views."""
    point_features: torch.Tensor | None = None
    """[1, N, W]: in place of `points`."""


def prompt_text(instruction: str, caption: str, modalities: str) -> str:
    """The words before the sequence: the instruction, and the description where text is among the modalities.

    Whatever the codec, nothing in them can be taken for a token of a CAD sequence.
    """
    return without_words(f"{instruction}\n{caption}\n" if "text" in modalities.split("+") else f"{instruction}\n")


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Tokens of every sample of a split, counted once: int32[N] each."""

    prompt: np.ndarray
    bare_prompt: int
    target: np.ndarray

    def text_tokens(self, index: int, modalities: str) -> int:
        """Prompt and sequence tokens of sample `index`; EOS is a label only and takes no place."""
        prompt = int(self.prompt[index]) if "text" in modalities.split("+") else self.bare_prompt
        return prompt + int(self.target[index])


def count_tokens(
    tokenizer: Tokenizer,
    instruction: str,
    captions: Sequence[str],
    sequences: Sequence[str],
    *,
    respell: Callable[[str], str] = str,
    count: Callable[[str], int] | None = None,
) -> TokenLengths:
    """Token counts of all samples, in slices so that memory stays bounded.

    `sequences` are as stored, `respell` as in `ExampleBuilder`. `count` gives the tokens of a respelt one where that is known
    without the tokenizer, which at 450,000 samples is a matter of seconds instead of minutes.
    """

    def lengths(
        texts: Sequence[str], spell: Callable[[str], str] = str, count: Callable[[str], int] | None = None
    ) -> np.ndarray:
        if count is not None:
            return np.fromiter((count(spell(text)) for text in texts), dtype=np.int32, count=len(texts))
        counts: list[int] = []
        for start in range(0, len(texts), 4096):
            ids = tokenizer([spell(text) for text in texts[start : start + 4096]], add_special_tokens=False)[
                "input_ids"
            ]
            counts.extend(len(row) for row in ids)
        return np.asarray(counts, dtype=np.int32)

    prompts = [prompt_text(instruction, caption, "text") for caption in captions]
    bare = int(lengths([prompt_text(instruction, "", "point")])[0])
    return TokenLengths(prompt=lengths(prompts), bare_prompt=bare, target=lengths(sequences, respell, count))


@dataclass(frozen=True, slots=True)
class ExampleBuilder:
    """Builds the example of a sample; safe to call from several threads."""

    tokenizer: Tokenizer
    instruction: str
    shape: ExampleShape
    seed: int
    respell: Callable[[str], str] = str
    """From a stored sequence to the same design in the run's codec."""
    features: SplitFeatures | None = None
    """Where the split's stored features are read, in place of the sample's own views and points."""

    def build(self, sample: Sample, *, index: int, epoch: int, modalities: str) -> Example:
        """The example of `sample` (number `index` of its split) as `epoch` sees it; -1 is validation."""
        kinds = modalities.split("+")
        shown = self._shown(sample, index, epoch, kinds)
        num_image = self.shape.tokens_per_view * self.shape.views if "image" in kinds else 0
        num_point = self.shape.point_tokens if "point" in kinds else 0
        texts = [prompt_text(self.instruction, sample.caption, modalities), self.respell(sample.sequence)]
        prompt, target = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        before = num_image + num_point + len(prompt)
        input_ids = np.array([eos] * (num_image + num_point) + prompt + target, dtype=np.int64)
        labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
        labels[before - 1 : -1] = target
        labels[-1] = eos
        return Example(sample.id, input_ids, labels, num_image, num_point, **shown)

    def _shown(self, sample: Sample, index: int, epoch: int, kinds: list[str]) -> dict[str, Any]:
        """Views and points of an example, or their features, by the names of `Example`."""
        if self.features is None:
            return {
                "pixel_values": self._views(sample, index, epoch) if "image" in kinds else None,
                "points": self._points(sample, index, epoch) if "point" in kinds else None,
            }
        shown: dict[str, Any] = {"pixel_values": None, "points": None}
        if "image" in kinds:
            chosen = self._choose_views(sample, index, epoch, self.features.num_views(index))
            shown["image_features"] = self.features.views(index, chosen)
        if "point" in kinds:
            if not self.features.has_cloud(index):
                raise DataError("the sample has no points but was drawn with points", where=sample.id)
            shown["point_features"] = self.features.cloud(index, epoch)
        return shown

    def _choose_views(self, sample: Sample, index: int, epoch: int, available: int) -> list[int]:
        if not available:
            raise DataError("the sample has no images but was drawn with images", where=sample.id)
        return draw_views(self.seed, epoch, index, available, self.shape.views)

    def _views(self, sample: Sample, index: int, epoch: int) -> np.ndarray:
        chosen = self._choose_views(sample, index, epoch, len(sample.images))
        decoded = []
        for view in chosen:
            try:
                decoded.append(decode_image(sample.images[view], self.shape.image_size))
            except DataError as error:
                raise DataError(f"view {view}: {error}", where=sample.id) from error
        return np.stack(decoded)

    def _points(self, sample: Sample, index: int, epoch: int) -> np.ndarray:
        if sample.points is None:
            raise DataError("the sample has no points but was drawn with points", where=sample.id)
        return draw_points(self.seed, epoch, index, sample.points, self.shape.num_points)
