"""Marked models and keys in files of the Watermark-Robustness-Toolbox and of the code of DICTION."""

from __future__ import annotations

from mtlsign.schemes.other_formats.diction import (
    read_diction_file,
    read_diction_tensors,
    write_diction_file,
)
from mtlsign.schemes.other_formats.marked_file import MarkedFile
from mtlsign.schemes.other_formats.toolbox import (
    read_toolbox_file,
    read_toolbox_tensors,
    write_toolbox_file,
)

__all__ = [
    "MarkedFile",
    "read_diction_file",
    "read_diction_tensors",
    "read_toolbox_file",
    "read_toolbox_tensors",
    "write_diction_file",
    "write_toolbox_file",
]
