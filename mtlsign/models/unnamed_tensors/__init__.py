"""Tensors of a file without regard to their names: axis orders, candidates, and matching by their order."""

from mtlsign.models.unnamed_tensors.axis_orders import axis_orders, in_axis_order, is_stored_as
from mtlsign.models.unnamed_tensors.file_tensors import FileTensor, file_tensors
from mtlsign.models.unnamed_tensors.name_order import match_by_order

__all__ = ["FileTensor", "axis_orders", "file_tensors", "in_axis_order", "is_stored_as", "match_by_order"]
