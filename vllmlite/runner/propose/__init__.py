"""Proposers of draft tokens for speculative decoding."""
