"""How many tokens a design takes in each written form.

    python -m tests.cad.token_lengths TOKENIZER_DIR FILE_OR_FOLDER...

TOKENIZER_DIR is a folder that transformers' AutoTokenizer opens. Every `*.json` below the given paths is read as a design;
`raw json` is the file itself without blanks, what a model would learn that is given the documents as they are. Special
tokens are not counted. No test: a measurement to repeat whenever a grammar changes; `docs/data.md` quotes its figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median

from cadtrain.cad import codec_names, get_codec, quantize, read_design
from cadtrain.errors import CadtrainError


def main(tokenizer_dir: str, *paths: str) -> int:
    """Print one row of figures for each form; files that are no designs are named and left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts: dict[str, list[str]] = {name: [] for name in ("raw json", *codec_names())}
    for path in design_files(paths):
        try:
            quantized = quantize(read_design(path))
        except CadtrainError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        texts["raw json"].append(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
        for name in codec_names():
            texts[name].append(get_codec(name).encode(quantized))
    print(f"{len(texts['raw json'])} designs, {type(tokenizer).__name__} of {len(tokenizer)} entries")
    print(f"{'form':<12}{'mean':>8}{'median':>8}{'p90':>8}{'p99':>8}{'max':>8}   over 512   over 1024")
    for name, written in texts.items():
        lengths = sorted(len(ids) for ids in tokenizer(written, add_special_tokens=False)["input_ids"])
        print(row(name, lengths))
    return 0


def design_files(paths: Iterable[str]) -> list[Path]:
    """All JSON files among and below the paths."""
    found = [Path(path) for path in paths]
    return sorted(item for path in found for item in (path.rglob("*.json") if path.is_dir() else (path,)))


def row(name: str, lengths: list[int]) -> str:
    """One line of the table, of sorted lengths."""
    p90, p99 = (lengths[min(len(lengths) - 1, int(part * len(lengths)))] for part in (0.90, 0.99))
    over = [sum(length > limit for length in lengths) / len(lengths) for limit in (512, 1024)]
    figures = [mean(lengths), median(lengths), p90, p99, lengths[-1]]
    return f"{name:<12}" + "".join(f"{figure:>8.0f}" for figure in figures) + "".join(f"{part:>11.0%}" for part in over)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
