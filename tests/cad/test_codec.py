"""Codecs: one text for a design, and a reason for every other text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadtrain.cad import GRAMMAR_VERSION, QuantizedSequence, codec_names, get_codec, quantize
from cadtrain.errors import GrammarError, UsageError
from tests.cad.designs import PLATE_WITH_HOLE, quantized_sequences, unhurried

NAMES = ("compact", "deepcad17", "json")
CODEC = get_codec("compact")
PLATE = "Sa68,92,122,120L223,128L223,185L128,185L128,128;C176,157,19ENO140."
TEXTS = {
    "compact": PLATE,
    "deepcad17": "4\n0,223,128\n0,223,185\n0,128,185\n0,128,128\n4\n2,176,157,19\n5,128,128,128,68,92,122,120,140,128,0,0\n3",
    "json": (
        '{"steps":[{"plane":0,"position":[68,92,122],"size":120,"loops":[[["L",223,128],["L",223,185],["L",128,185],'
        '["L",128,128]],[["C",176,157,19]]],"operation":"new","extent":"one_side","distances":[140]}]}'
    ),
}


def test_codecs_have_names_and_versions() -> None:
    assert set(NAMES) <= set(codec_names())
    assert CODEC.version == GRAMMAR_VERSION
    for name in codec_names():
        assert get_codec(name).name == name
        assert get_codec(name).version >= 1


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no codec named 'compcat'.*Known: .*compact"):
        get_codec("compcat")


@pytest.mark.parametrize("name", NAMES)
def test_a_plate_with_a_hole_is_one_short_text(name: str) -> None:
    assert get_codec(name).encode(quantize(PLATE_WITH_HOLE)) == TEXTS[name]


@unhurried
@given(quantized_sequences)
def test_every_design_comes_back_from_its_texts(sequence: QuantizedSequence) -> None:
    for name in NAMES:
        text = get_codec(name).encode(sequence)
        assert get_codec(name).decode(text) == sequence


@unhurried
@given(quantized_sequences)
def test_the_json_text_is_json(sequence: QuantizedSequence) -> None:
    text = get_codec("json").encode(sequence)
    assert json.dumps(json.loads(text), separators=(",", ":")) == text


def read_or_refused(name: str, text: str) -> None:
    """Whatever the text is: a design that has this text, or a place in it and a reason."""
    codec = get_codec(name)
    try:
        sequence = codec.decode(text)
    except GrammarError as caught:
        error = caught
    else:
        assert codec.encode(sequence) == text
        return
    assert 0 <= error.position <= len(text)
    assert error.reason


@unhurried
@given(st.text(alphabet='SLABCENJIOTax(),;.0123456789\n \u0660\ud800[]{}"plane:', max_size=60) | st.text(max_size=40))
def test_any_text_is_a_design_or_a_grammar_error(text: str) -> None:
    for name in NAMES:
        read_or_refused(name, text)
        read_or_refused(name, TEXTS[name][: len(text)] + text)


@unhurried
@given(quantized_sequences, st.data())
def test_a_changed_text_is_another_design_or_a_grammar_error(sequence: QuantizedSequence, data: st.DataObject) -> None:
    for name in NAMES:
        text = get_codec(name).encode(sequence)
        start = data.draw(st.integers(0, len(text) - 1))
        end = start + data.draw(st.integers(0, 3))
        put = data.draw(
            st.sampled_from(
                ["", "0", "9", "255", ",", *text[:12], ";", ".", "\n", " ", "]", '"', "\u00b2", "-1", "1e3"]
            )
        )
        read_or_refused(name, text[:start] + put + text[end:])


@pytest.mark.parametrize("name", NAMES)
def test_a_monstrous_text_is_refused_like_any_other(name: str) -> None:
    plate = TEXTS[name]
    for text in (
        "[" * 200_000,
        "{" * 200_000,
        "(" * 200_000,
        "9" * 200_000,
        "4\n" * 100_000,
        "\ud800",
        "\x00",
        "\ufeff" + plate,
    ):
        with pytest.raises(GrammarError) as caught:
            get_codec(name).decode(text)
        assert len(str(caught.value)) < 300
    for place in range(0, len(plate), 7):
        read_or_refused(name, plate[:place] + "8" * 100_000 + plate[place:])


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_off_text_is_refused_at_or_before_its_end(name: str) -> None:
    text = TEXTS[name]
    for length in range(len(text)):
        with pytest.raises(GrammarError) as caught:
            get_codec(name).decode(text[:length])
        assert caught.value.position <= length


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, "expected a sketch 'S', but the text ends"),
        ("Qa", 0, "expected a sketch 'S', found 'Q'"),
        ("Sy1", 1, "expected a plane 'a'..'x' or '(', found 'y'"),
        (PLATE.replace("223,185", "256,185"), 24, "x is 256, outside 0..255"),
        (PLATE.replace("223,185", "023,185"), 24, "x is written 023, with a leading zero"),
        (PLATE.replace("120L", "0L"), 12, "the size is 0, outside 1..255"),
        (PLATE.replace("19E", "0E"), 57, "the radius is 0, outside 1..255"),
        (PLATE.replace("L128,185", "L223,185"), 15, "a curve ends where it starts"),
        (PLATE.replace("L223,128L223,185L128,185L128,128", "L223,128"), 15, "a loop of one curve is not closed"),
        (PLATE.replace(";", ""), 15, "a circle stands beside other curves in one loop"),
        (PLATE.replace("L223,185L128,185", ""), 15, "a loop encloses no area"),
        (PLATE.replace("ENO140", "ENO128"), 62, "the extrusion has no thickness"),
        (PLATE.replace("ENO", "EXO"), 60, "expected an operation 'N', 'J', 'C' or 'I', found 'X'"),
        (PLATE.replace("Sa", "S(0,0,64)"), 1, "these angles are an axis frame and must be written as one"),
        (PLATE.replace("Sa", "S(0,3,1)"), 1, "phi is 3, it must be 0 where theta is 0"),
        (PLATE + ".", len(PLATE), "something follows the end mark"),
        (PLATE[:-1], len(PLATE) - 1, "expected a new line and the next step, or the end mark '.', but the text ends"),
        (PLATE.replace(",", ", "), 5, "expected the position's y, a number, found ' '"),
    ],
)
def test_an_error_names_the_place_and_the_reason(text: str, position: int, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        CODEC.decode(text)
    assert (caught.value.position, caught.value.reason) == (position, reason)


@pytest.mark.parametrize(
    ("name", "old", "new", "at", "reason"),
    [
        ("json", '"size":120', '"size": 120', " 120", "expected the size, a number, found ' '"),
        ("json", '"size":120', '"size":0', "0,\"loops", "the size is 0, outside 1..255"),
        ("json", '"new"', '"weld"', "weld", "expected 'new', 'join', 'cut' or 'intersect'"),
        ("json", '"plane":0', '"plane":24', "24", "the plane is 24, outside 0..23"),
        ("json", '"plane":0', '"plane":[0,0,64]', "[0,0,64]", "these angles are an axis frame and must be written as one"),
        ("json", '["L",223,185],["L",128,185],', "", '[["L",223', "a loop encloses no area"),
        ("json", "[140]", "[140,128]", ",128]}", "expected ']}', found ','"),
        ("json", "[140]}]}", "[140]}]", "]", "expected ',' and the next step, or the end ']}', found ']'"),
        ("deepcad17", "5,128,128,128", "5,127,128,128", "127,128,128", "theta is 127, it must be 0 or at least 128"),
        ("deepcad17", "5,128,128,128", "5,128,129,128", "128,129,128", "phi is 129, it must be 128 where theta is 128"),
        ("deepcad17", "140,128,0,0", "140,130,0,0", "140,130", "the second distance is 130, only a two-sided extrusion has one"),
        ("deepcad17", "140,128,0,0", "140,128,4,0", "4,0\n3", "the operation is 4, outside 0..3"),
        ("deepcad17", "0,223,128\n", "0,223,128,-1\n", ",-1", "expected a new line, found ','"),
    ],
)  # fmt: skip
def test_the_other_codecs_name_place_and_reason_too(name: str, old: str, new: str, at: str, reason: str) -> None:
    text = TEXTS[name].replace(old, new)
    with pytest.raises(GrammarError) as caught:
        get_codec(name).decode(text)
    assert (text[caught.value.position :].startswith(at), caught.value.reason) == (True, reason)
