"""Quantisation schemes, one per file: the tensors of a stored weight, how it is sliced, how it is dequantised."""
