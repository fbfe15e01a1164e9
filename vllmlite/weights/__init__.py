"""Checkpoint formats: from files to host tensors, strictly."""
