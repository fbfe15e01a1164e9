"""Common fields and types of requests and answers; each API's own are in its folder.

Requests are pydantic models that are strict about types and names. Answers are typed dictionaries, which cost nothing
to create.
"""
