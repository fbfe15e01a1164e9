"""Quantisation schemes, one file each: what a checkpoint stores for a weight, how it is sliced, what it means."""
