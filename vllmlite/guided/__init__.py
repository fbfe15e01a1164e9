"""Guided output: grammars that restrict the next token, compiled by xgrammar in a separate process."""
