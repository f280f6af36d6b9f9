"""How a number becomes bits: every storage format as a row of one table, its packing and its exact meaning."""

from halve.formats.base import FORMATS, Format, Weight, check, format_named
from halve.formats.integer import pack_codes, unpack_codes

__all__ = ["FORMATS", "Format", "Weight", "check", "format_named", "pack_codes", "unpack_codes"]
