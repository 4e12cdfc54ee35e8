"""A design file of whatever format: what it is can be told from its keys."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from cadtrain.cad.formats.deepcad import parse_deepcad
from cadtrain.cad.formats.fusion360 import parse_fusion360
from cadtrain.cad.formats.node import load_json
from cadtrain.cad.sequence import CadSequence


class DesignFormat(StrEnum):
    """The formats that `read_design` knows."""

    DEEPCAD = "deepcad"
    FUSION360 = "fusion360"


def design_format(document: Any) -> DesignFormat:
    """What a parsed document claims to be.

    Only the Fusion 360 Gallery's documents have a `timeline` and `metadata`; all others are taken for DeepCAD's and
    Omni-CAD's.
    """
    is_fusion = isinstance(document, dict) and ("timeline" in document or "metadata" in document)
    return DesignFormat.FUSION360 if is_fusion else DesignFormat.DEEPCAD


def read_design(path: str | Path) -> CadSequence:
    """The design in a DeepCAD, Omni-CAD or Fusion 360 Gallery file, in metres.

    Raises `SchemaError` (place in the document, value found, reason; all faults of the file) for a document that breaks
    its schema, `DataError` for a file that is not there, is no UTF-8 or no complete JSON (line and column).
    """
    document = load_json(path)
    parse = parse_fusion360 if design_format(document) is DesignFormat.FUSION360 else parse_deepcad
    return parse(document, str(path))
