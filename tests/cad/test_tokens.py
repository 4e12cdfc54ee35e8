"""The tokens codec: one row of words for a design, a reason for every other text, and the same design as the compact text."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadtrain.cad import (
    QuantizedSequence,
    added_vocabulary,
    codec_names,
    get_codec,
    quantize,
    read_deepcad_json,
    respelling,
)
from cadtrain.cad.tokens import num_words, respell_compact, vocabulary, without_words
from cadtrain.errors import GrammarError
from tests.cad.designs import PLATE_WITH_HOLE, quantized_sequences, unhurried

CODEC, COMPACT = get_codec("tokens"), get_codec("compact")


def row(words: str) -> str:
    """`Sa 68 92` as the words of the vocabulary."""
    return "".join(f"<cad:{word}>" for word in words.split())


PLATE_WORDS = "Sa 68 92 122 120 L 223 128 L 223 185 L 128 185 L 128 128 ; C 176 157 19 ENO 140 ."
PLATE = row(PLATE_WORDS)


def test_a_plate_with_a_hole_is_25_words() -> None:
    assert CODEC.encode(quantize(PLATE_WITH_HOLE)) == PLATE
    assert PLATE.count("<cad:") == 25
    assert (CODEC.name, CODEC.version) == ("tokens", 1)
    assert "tokens" in codec_names()


def test_the_vocabulary_is_fixed() -> None:
    """Ids in trained models follow from it: a change of words or order needs a new version."""
    words = vocabulary()
    assert len(words) == len(set(words)) == 299
    names = [word.removeprefix("<cad:").removesuffix(">") for word in words]
    assert names[:26] == [*(f"S{letter}" for letter in "abcdefghijklmnopqrstuvwx"), "S*", "L"]
    assert names[26:30] == ["A", "B", "C", ";"]
    assert names[30:42] == [f"E{operation}{extent}" for operation in "NJCI" for extent in "OST"]
    assert names[42:] == [*map(str, range(256)), "."]
    assert added_vocabulary("tokens") == words
    assert added_vocabulary("compact") == ()


@unhurried
@given(quantized_sequences)
def test_every_design_comes_back_from_its_words_and_from_the_compact_text(sequence: QuantizedSequence) -> None:
    words = CODEC.encode(sequence)
    assert CODEC.decode(words) == sequence
    found = re.findall(r"<cad:[^<>]+>", words)
    assert "".join(found) == words
    assert set(found) <= set(vocabulary())
    assert num_words(words) == len(found)
    compact = COMPACT.encode(sequence)
    assert respell_compact(compact) == words
    assert respelling("compact", "tokens")(compact) == words
    assert respelling("tokens", "compact")(words) == compact
    assert respelling("tokens", "tokens")(words) == words


@unhurried
@given(
    st.lists(
        st.sampled_from([*vocabulary()[::9], *vocabulary()[24:43], "<cad:256>", "<cad:01>", "<cad:", " ", "x"]),
        max_size=25,
    )
)
def test_any_row_of_words_is_a_design_or_a_grammar_error(words: list[str]) -> None:
    _design_or_error("".join(words))


@unhurried
@given(st.text(alphabet="<cad:>SaLENO.;0129 \n\u0660", max_size=60))
def test_any_text_is_a_design_or_a_grammar_error(text: str) -> None:
    _design_or_error(text)


@unhurried
@given(quantized_sequences, st.data())
def test_a_changed_row_is_another_design_or_a_grammar_error(sequence: QuantizedSequence, data: st.DataObject) -> None:
    words = re.findall(r"<cad:[^<>]+>", CODEC.encode(sequence))
    place = data.draw(st.integers(0, len(words) - 1))
    words[place : place + data.draw(st.integers(0, 2))] = data.draw(st.lists(st.sampled_from(vocabulary()), max_size=2))
    _design_or_error("".join(words))


def _design_or_error(text: str) -> None:
    try:
        sequence = CODEC.decode(text)
    except GrammarError as caught:
        error = caught
    else:
        assert CODEC.encode(sequence) == text
        return
    assert 0 <= error.position <= len(text)
    assert error.reason


def test_every_cut_off_row_is_refused_at_or_before_its_end() -> None:
    for length in range(len(PLATE)):
        with pytest.raises(GrammarError) as caught:
            CODEC.decode(PLATE[:length])
        assert caught.value.position <= length


@pytest.mark.parametrize(
    ("text", "words_before", "reason"),
    [
        ("", 0, "expected a sketch <cad:Sa>..<cad:Sx> or <cad:S*>, but the text ends"),
        ("Sa68,92", 0, "expected a sketch <cad:Sa>..<cad:Sx> or <cad:S*>, found 'Sa68,92'"),
        (PLATE.replace("<cad:68>", "<cad:068>"), 1, "expected the position's x, a number, found '<cad:068>'"),
        (PLATE.replace("<cad:68>", "<cad:256>"), 1, "expected the position's x, a number, found '<cad:256>'"),
        (PLATE.replace("<cad:68>", "<cad:L>"), 1, "expected the position's x, a number, found <cad:L>"),
        (PLATE.replace("<cad:120>", "<cad:0>"), 4, "the size is 0, outside 1..255"),
        (PLATE.replace("<cad:19>", "<cad:0>"), 21, "the radius is 0, outside 1..255"),
        (PLATE.replace(row("L 128 185"), row("L 223 185")), 5, "a curve ends where it starts"),
        (PLATE.replace(row(";"), ""), 5, "a circle stands beside other curves in one loop"),
        (PLATE.replace(row("140"), row("128")), 23, "the extrusion has no thickness"),
        (PLATE.replace(row("Sa"), row("S* 0 0 64")), 0, "these angles are an axis frame and must be written as one"),
        (PLATE + row("."), 25, "something follows the end mark"),
        (PLATE[: -len(row("."))], 24, "expected the next sketch <cad:Sa>..<cad:Sx> or <cad:S*>, or the end mark <cad:.>, but the text ends"),
    ],
)  # fmt: skip
def test_an_error_names_the_place_and_the_reason(text: str, words_before: int, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        CODEC.decode(text)
    places = [0, *(match.end() for match in re.finditer("<cad:[^>]*>", text))]
    assert caught.value.position == places[words_before]
    assert caught.value.reason == reason


@given(st.text(alphabet="<cad:> S1", max_size=30))
def test_no_caption_spells_a_word(text: str) -> None:
    assert "<cad:" not in without_words(text)
    if "<cad:" not in text:
        assert without_words(text) == text


def test_real_designs_are_short(shared_data: Path) -> None:
    """The first sixty Omni-CAD files: the same design again, in a third of the compact text's tokens or less."""
    lengths = []
    for path in sorted((shared_data / "omni-cad-test-subset").rglob("*.json"))[:60]:
        quantized = quantize(read_deepcad_json(path))
        words = CODEC.encode(quantized)
        compact = COMPACT.encode(quantized)
        assert respell_compact(compact) == words
        assert CODEC.decode(words) == quantized
        lengths.append(words.count("<cad:"))
    assert statistics.median(lengths) <= 69
