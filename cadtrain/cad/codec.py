"""Codecs by name: how a quantised design is written as the text that a model learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cadtrain.cad import tokens
from cadtrain.cad.deepcad17_codec import Deepcad17Codec
from cadtrain.cad.grammar import CompactCodec
from cadtrain.cad.grid import QuantizedSequence
from cadtrain.cad.json_codec import JsonCodec
from cadtrain.cad.tokens import TokensCodec
from cadtrain.errors import UsageError


class Codec(Protocol):
    """One written form of a design; `decode(encode(q)) == q` for every q."""

    @property
    def name(self) -> str:
        """The name in configurations and data sets."""

    @property
    def version(self) -> int:
        """Raised whenever a text changes its meaning or ceases to be accepted."""

    def encode(self, sequence: QuantizedSequence) -> str:
        """The design's text."""

    def decode(self, text: str) -> QuantizedSequence:
        """The text's design; raises `GrammarError`, and nothing else, for a text that spells none."""


_CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Make a codec known by its name; raises `ValueError` if the name is taken."""
    if codec.name in _CODECS:
        raise ValueError(f"a codec named {codec.name!r} exists already")
    _CODECS[codec.name] = codec


def codec_names() -> tuple[str, ...]:
    """The names of all known codecs, sorted."""
    return tuple(sorted(_CODECS))


def get_codec(name: str) -> Codec:
    """The codec of that name; raises `UsageError` that lists the known ones."""
    try:
        return _CODECS[name]
    except KeyError:
        raise UsageError(f"there is no codec named {name!r}.", hint=f"Known: {', '.join(codec_names())}.") from None


def added_vocabulary(name: str) -> tuple[str, ...]:
    """The words that a tokenizer must be given before it reads that codec's texts as one token a word; most need none."""
    return tokens.vocabulary() if get_codec(name).name == TokensCodec.name else ()


def token_counter(name: str) -> Callable[[str], int] | None:
    """What counts the tokens of that codec's texts where every word is one; None where it takes a tokenizer."""
    return tokens.num_words if get_codec(name).name == TokensCodec.name else None


def respelling(source: str, target: str) -> Callable[[str], str]:
    """What turns a text that codec `source` wrote into the same design's text in codec `target`.

    Raises `UsageError` for a name that is not known.
    """
    reads, writes = get_codec(source), get_codec(target)
    if reads.name == writes.name:
        return str
    if (reads.name, writes.name) == (CompactCodec.name, TokensCodec.name):
        return tokens.respell_compact
    return lambda text: writes.encode(reads.decode(text))


register_codec(CompactCodec())
register_codec(Deepcad17Codec())
register_codec(JsonCodec())
register_codec(TokensCodec())
