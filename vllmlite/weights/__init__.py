"""Checkpoint formats: strict readers of files, which return tensors in host memory."""
