"""Text to token ids and back, from every source of tokenizers."""
