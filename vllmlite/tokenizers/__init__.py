"""Conversion between text and token ids, for all kinds of tokenizers."""
