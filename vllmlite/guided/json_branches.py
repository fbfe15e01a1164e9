"""Branches of ``oneOf``, and whether no value can match two of them, so that ``anyOf`` means the same."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.guided.json_keywords import Schema, SchemaError


@dataclass(slots=True)
class Branch:
    """The properties that distinguish a branch of ``oneOf`` from other branches."""

    said: Schema
    kinds: frozenset[str]
    values: set[str] | None
    """Identities of the values that its enum or const allows; None without these."""
    tags: dict[str, set[str]]
    """For each property limited to named values, the identities of these values."""
    required: frozenset[str]
    names: frozenset[str] | None
    """The only property names that are generated; None if others may be generated."""
    shut: bool
    """Whether the schema forbids other properties."""

    def excludes(self, other: Branch) -> bool:
        """Return whether no object generated for this branch can satisfy ``other``."""
        without = self.names is not None and bool(other.required - self.names)
        refused = other.shut and other.names is not None and bool(self.required - other.names)
        return without or refused


def disjoint(branches: list[Branch], alone: bool) -> list[Schema]:
    """Return the schemas of ``branches``, so that no value matches two of them.

    ``alone``: the schema has no object keyword beside the branches. Raises SchemaError unless the branches that allow
    the same type are clearly disjoint: each allows values of its own, has a property with values of its own (which it
    is made to require), or requires a property that the others lack."""
    for kind in dict.fromkeys(kind for branch in branches for kind in branch.kinds):
        group = [branch for branch in branches if kind in branch.kinds]
        values = [branch.values for branch in group if branch.values is not None]
        if len(group) == 1 or (len(values) == len(group) and _are_disjoint(values)):
            continue
        if alone and kind == "object" and all(a.excludes(b) for a in group for b in group if a is not b):
            continue
        tag = _tag(group) if kind == "object" else None
        if tag is None:
            raise SchemaError(
                "has oneOf with two branches that may match at once: use anyOf, or give each a type, a property "
                "with a const of its own, or a required property that the others lack"
            )
        for branch in group:
            if tag not in branch.required:
                branch.said = {**branch.said, "required": [*branch.said.get("required", []), tag]}
    return [branch.said for branch in branches]


def _tag(group: list[Branch]) -> str | None:
    """Return a property whose values differ in every branch of ``group``, preferably one that all require; or None."""
    found = [
        name
        for name in group[0].tags
        if all(name in branch.tags for branch in group)
        and _are_disjoint([branch.tags[name] for branch in group])
    ]
    return max(found, key=lambda name: all(name in branch.required for branch in group), default=None)


def _are_disjoint(sets: list[set[str]]) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))
