"""The tokenizer of a language model: a pretrained one, or the built-in one of single bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cadtrain import hub
from cadtrain.config.sections import LanguageModelConfig
from cadtrain.errors import ConfigError, Fault, UsageError

BYTES = "bytes"
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"


def build_tokenizer(config: LanguageModelConfig, vocabulary: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer that `config` names, with each word of `vocabulary` as one token; it has an end-of-sequence token.

    Raises ConfigError when it cannot be opened, is not one of the fast kind, or has no end-of-sequence token: without
    one a model never learns where a sequence ends.
    """
    source = config.tokenizer or config.pretrained or BYTES
    where = "model.language.tokenizer" if config.tokenizer else "model.language.pretrained"
    is_bytes = source == BYTES and not os.path.isdir(source)
    tokenizer = byte_tokenizer() if is_bytes else _open_tokenizer(source, where)
    if vocabulary:
        _add_vocabulary(tokenizer, vocabulary, where)
    return tokenizer


def first_added_id(tokenizer: PreTrainedTokenizerBase, vocabulary: Sequence[str]) -> int:
    """The lowest id of `vocabulary`, whose words `build_tokenizer` added; raises UsageError where one is missing."""
    known = tokenizer.get_vocab()
    missing = [word for word in vocabulary if word not in known]
    if missing:
        raise UsageError(
            f"the tokenizer lacks {len(missing)} of the codec's {len(vocabulary)} tokens, the first is {missing[0]}.",
            hint="Build it with the codec's vocabulary.",
        )
    return min(known[word] for word in vocabulary)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's highest id: the rows that its model needs. Where ids are left out it exceeds `len`."""
    return max(tokenizer.get_vocab().values()) + 1


def knows_vocabulary(source: str, vocabulary: Sequence[str]) -> bool:
    """Whether the tokenizer in the pretrained folder `source` has all of `vocabulary`, so that its model learnt it."""
    try:
        known = AutoTokenizer.from_pretrained(source).get_vocab()
    except (OSError, ValueError):
        return False
    return all(word in known for word in vocabulary)


def _add_vocabulary(tokenizer: PreTrainedTokenizerFast, vocabulary: Sequence[str], where: str) -> None:
    """Add what is missing of `vocabulary`; raises ConfigError where the words do not come out as one token each."""
    # Not special: decoding that skips special tokens must keep them.
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in vocabulary])
    text = "".join(vocabulary)
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    if ids != tokenizer.convert_tokens_to_ids(list(vocabulary)) or tokenizer.decode(ids) != text:
        message = f"{tokenizer.name_or_path or 'the tokenizer'} does not read each of the codec's tokens as one token"
        hint = "Use another tokenizer, or `data.codec: compact`, which needs no tokens of its own."
        raise ConfigError([Fault(where, message, hint)])


def _open_tokenizer(source: str, where: str) -> PreTrainedTokenizerFast:
    hub.require(source, where, *hub.TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = "Give a local folder, a hub name, or `bytes`."
        raise ConfigError([Fault(where, f"no tokenizer could be opened from {source!r}: {error}", hint)]) from error
    faults = []
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        faults.append(Fault(where, f"{source!r} is a {type(tokenizer).__name__}, not a tokenizer of the fast kind"))
    if tokenizer.eos_token_id is None:
        hint = "Set `eos_token` in its tokenizer_config.json."
        faults.append(Fault(where, f"the tokenizer of {source!r} has no end-of-sequence token", hint))
    if faults:
        raise ConfigError(faults)
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 258 tokens: id b for the byte b of the UTF-8 text, then `<pad>` (256) and `<eos>` (257).

    The text `<eos>` inside a caption is read as five bytes, never as the token.
    """
    characters = _byte_characters()
    tokenizer = Tokenizer(BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (PAD_TOKEN, EOS_TOKEN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte 0 to 255 (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
