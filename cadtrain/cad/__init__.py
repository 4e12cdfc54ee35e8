"""What a design is: sequences of sketches and extrusions, their 8-bit form, their text, their files."""

from cadtrain.cad.codec import (
    Codec,
    added_vocabulary,
    codec_names,
    get_codec,
    register_codec,
    respelling,
    token_counter,
)
from cadtrain.cad.describe import PartFacts, describe, facts
from cadtrain.cad.formats import read_design
from cadtrain.cad.formats.deepcad import parse_deepcad, read_deepcad_json, to_deepcad_json
from cadtrain.cad.grammar import GRAMMAR_VERSION
from cadtrain.cad.grid import (
    PlaneAngles,
    QuantizedArc,
    QuantizedCircle,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
)
from cadtrain.cad.quantize import Frame, dequantize, normalize, quantize
from cadtrain.cad.sequence import (
    Arc,
    BoundingBox,
    CadSequence,
    Circle,
    Extent,
    Line,
    Loop,
    Operation,
    Profile,
    SketchExtrude,
    SketchPlane,
)

__all__ = [
    "GRAMMAR_VERSION", "Arc", "BoundingBox", "CadSequence", "Circle", "Codec", "Extent", "Frame", "Line", "Loop",
    "Operation", "PartFacts", "PlaneAngles", "Profile", "QuantizedArc", "QuantizedCircle", "QuantizedLine",
    "QuantizedLoop", "QuantizedSequence", "QuantizedStep", "SketchExtrude", "SketchPlane", "added_vocabulary", "codec_names",
    "dequantize", "describe", "facts", "get_codec", "normalize", "parse_deepcad", "quantize", "read_deepcad_json", "read_design",
    "register_codec", "respelling", "to_deepcad_json",
    "token_counter",
]  # fmt: skip
