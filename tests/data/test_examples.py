"""From a sample to tokens and labels, with a tokenizer whose ids can be read: one a character."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cadtrain.data.examples import IGNORED, Example, ExampleBuilder, ExampleShape, count_tokens, prompt_text
from cadtrain.data.sample import Sample
from cadtrain.errors import DataError
from tests.train.tiny import png

EOS = 1
SHAPE = ExampleShape(tokens_per_view=3, views=2, image_size=14, point_tokens=4, num_points=5)


class Letters:
    """A tokenizer of one id a character: 2 + its code point."""

    eos_token_id = EOS

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens, "cadtrain places the special tokens itself"
        return {"input_ids": [[ord(letter) + 2 for letter in row] for row in text]}


def words(ids: np.ndarray) -> str:
    """Ids as text: `_` for EOS, `-` for a position that predicts nothing."""
    return "".join({EOS: "_", IGNORED: "-"}.get(token) or chr(token - 2) for token in ids.tolist())


def part(*, points: bool = True, images: int = 2, sequence: str = "S1,2e") -> Sample:
    cloud = np.arange(60, dtype=np.float32).reshape(10, 6) if points else None
    return Sample("a/1", "a", "cap", sequence, cloud, tuple(png(n) for n in range(images)))


def build(modalities: str, sample: Sample | None = None, *, epoch: int = 0) -> Example:
    return ExampleBuilder(Letters(), "Do.", SHAPE, seed=0).build(
        sample or part(), index=3, epoch=epoch, modalities=modalities
    )


def test_text_alone() -> None:
    example = build("text")
    assert words(example.input_ids) == "Do.\ncap\nS1,2e"
    assert words(example.labels) == "-------S1,2e_"
    assert example.pixel_values is None
    assert example.points is None
    assert (example.num_image_tokens, example.num_point_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("modalities", "inputs", "labels"),
    [
        ("text+point", "____Do.\ncap\nS1,2e", "-----------S1,2e_"),
        ("text+image", "______Do.\ncap\nS1,2e", "-------------S1,2e_"),
        ("text+point+image", "__________Do.\ncap\nS1,2e", "-----------------S1,2e_"),
        ("point", "____Do.\nS1,2e", "-------S1,2e_"),
        ("image", "______Do.\nS1,2e", "---------S1,2e_"),
        ("point+image", "__________Do.\nS1,2e", "-------------S1,2e_"),
    ],
)
def test_placeholders_stand_before_the_prompt(modalities: str, inputs: str, labels: str) -> None:
    example = build(modalities)
    assert words(example.input_ids) == inputs
    assert words(example.labels) == labels
    assert (example.pixel_values is not None) == ("image" in modalities)
    assert (example.points is not None) == ("point" in modalities)
    assert example.num_image_tokens + example.num_point_tokens == SHAPE.modality_tokens(modalities)


@pytest.mark.parametrize("modalities", ["text", "text+point", "point+image"])
@pytest.mark.parametrize("sequence", ["S", "S1,2e", "e" * 50])
def test_eos_is_appended_and_overwrites_nothing(modalities: str, sequence: str) -> None:
    """Every token of the sequence is a label, then EOS; a label is what the next input shows."""
    example = build(modalities, part(sequence=sequence))
    labels = example.labels[example.labels != IGNORED]
    assert words(labels) == sequence + "_"
    assert example.labels[-1] == EOS
    assert words(example.input_ids).endswith(sequence)
    shifted = example.labels[:-1]
    assert np.array_equal(example.input_ids[1:][shifted != IGNORED], shifted[shifted != IGNORED])


def test_counted_lengths_are_those_of_the_examples() -> None:
    """The plan of a step is made from counts; a pack must hold exactly what they promise."""
    sample = part()
    lengths = count_tokens(Letters(), "Do.", [sample.caption], [sample.sequence])
    for modalities in ("text", "point", "image", "text+point", "point+image", "text+point+image"):
        example = build(modalities)
        assert lengths.text_tokens(0, modalities) + SHAPE.modality_tokens(modalities) == len(example.input_ids)
        assert int((example.labels != IGNORED).sum()) == int(lengths.target[0]) + 1


def test_counting_goes_in_slices() -> None:
    captions = [f"c{'x' * (n % 7)}" for n in range(5000)]
    lengths = count_tokens(Letters(), "Do.", captions, ["S"] * 5000)
    assert lengths.prompt.tolist() == [len(prompt_text("Do.", caption, "text")) for caption in captions]
    assert lengths.bare_prompt == len("Do.\n")


def test_arrays_have_the_shape_that_the_model_expects() -> None:
    example = build("text+point+image")
    assert example.pixel_values is not None
    assert example.points is not None
    assert example.pixel_values.shape == (2, 3, 14, 14)
    assert example.points.shape == (5, 6)
    assert example.pixel_values.dtype == example.points.dtype == np.float32
    assert example.input_ids.dtype == example.labels.dtype == np.int64


def test_epochs_draw_other_points_and_validation_has_its_own() -> None:
    drawn = [build("text+point", epoch=epoch).points for epoch in (0, 0, 1, -1)]
    assert np.array_equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    assert not np.array_equal(drawn[0], drawn[2])  # type: ignore[arg-type]
    assert not np.array_equal(drawn[0], drawn[3])  # type: ignore[arg-type]


@pytest.mark.parametrize(("modalities", "sample"), [("point", part(points=False)), ("text+image", part(images=0))])
def test_a_missing_modality_names_the_sample(modalities: str, sample: Sample) -> None:
    with pytest.raises(DataError, match="has no") as caught:
        build(modalities, sample)
    assert caught.value.where == "a/1"


def test_a_broken_picture_names_the_sample_and_the_view() -> None:
    broken = Sample("a/1", "a", "cap", "S", None, (png(0), b"no picture"))
    with pytest.raises(DataError, match=r"view 1: .*no readable picture") as caught:
        build("image", broken)
    assert caught.value.where == "a/1"


def test_a_stored_sequence_is_respelt_for_the_run_in_counts_and_examples() -> None:
    def respell(text: str) -> str:
        return text.replace(",", "")

    sample = part()
    lengths = count_tokens(Letters(), "Do.", [sample.caption], [sample.sequence], respell=respell)
    assert lengths.target.tolist() == [len("S12e")]
    example = ExampleBuilder(Letters(), "Do.", SHAPE, 0, respell).build(sample, index=3, epoch=0, modalities="text")
    assert words(example.input_ids) == "Do.\ncap\nS12e"
    assert lengths.text_tokens(0, "text") == len(example.input_ids)


def test_a_prompt_never_holds_a_word_of_a_sequence() -> None:
    assert prompt_text("Make <cad:S*>.", "a <cad:12> plate", "text") == "Make < cad:S*>.\na < cad:12> plate\n"
