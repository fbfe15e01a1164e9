"""Policy: which request computes how many tokens in which cache blocks. Plain Python; no tensors anywhere."""
