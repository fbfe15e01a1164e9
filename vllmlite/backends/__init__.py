"""Compute backends: their interface (``base``), the implementations, and the choice between them (``select``)."""
