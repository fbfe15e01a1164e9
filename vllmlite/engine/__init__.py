"""Scheduling policy: decides how many tokens of each request a step computes, and in which cache blocks. Plain Python
without tensors.
"""
