"""File formats of designs, one module each."""

from cadtrain.cad.formats.design import DesignFormat, design_format, read_design

__all__ = ["DesignFormat", "design_format", "read_design"]
