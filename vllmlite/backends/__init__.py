"""Compute backends: the contract (base), those that implement it, and the choice between them (select)."""
