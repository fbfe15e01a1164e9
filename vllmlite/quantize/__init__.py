"""Write quantised checkpoints, and pack weights that have been rounded already."""

from vllmlite.quantize.checkpoint import Report, quantize_checkpoint
from vllmlite.quantize.formats import FORMATS, METHODS
from vllmlite.quantize.packing import PACK_FORMATS, pack

__all__ = ["FORMATS", "METHODS", "PACK_FORMATS", "Report", "pack", "quantize_checkpoint"]
