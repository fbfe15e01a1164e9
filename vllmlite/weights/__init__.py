"""Checkpoint formats: strict readers from files to tensors in host memory."""
