"""Guided output: grammars that restrict what may come next, compiled in a process of its own by xgrammar."""
