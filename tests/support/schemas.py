"""Random JSON Schemas of common forms, and a check of the output generated under them.

``scripts/fuzz_schemas`` runs this for hundreds of schemas, ``test_schemas.py`` for a few.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from vllmlite import LLM, SamplingParams, StructuredOutputsParams
from vllmlite.errors import ParameterError

NAMES = "id name kind title count price tags items owner address note ok created_at größe a b c".split()
WORDS = ["apt", "dpkg", "", 'a "quoted" one', "back\\slash", "ünïcode", "日本", "two\nlines", "🦀"]
PATTERNS = [
    r"^[a-z]+$", r"^[A-Z]{2}-\d{3,4}$", r"^\w*$", r"^(apt|dpkg)[0-9]?$", r"^[^0-9\s]{1,8}$", r"^.{2,5}$", r"\d+",
    r"^#[0-9a-fA-F]{6}$", r"^(?:[1-9]\d*|0)(?:\.\d{1,2})?$", r"^a$|^b$", r"^[\w.-]+@[\w-]+\.[a-z]{2,4}$",
]  # fmt: skip
FORMATS = "date time date-time duration email hostname ipv4 ipv6 uuid uri uri-reference json-pointer".split()
CLOSERS = ['"', '"}', '"]', "}", "]", "},", '",', ":", ","]
"""Texts of tokens that a bias favours, so that output of random weights comes to an end."""


class Maker:
    """Generates a sequence of schemas, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._definitions: list[str] = []

    def schema(self) -> dict[str, Any]:
        """A schema, mostly of an object."""
        random = self._random
        self._definitions = [f"Part{index}" for index in range(random.choice([0, 0, 1, 2]))]
        made = self._object(3) if random.random() < 0.8 else self._any(3)
        if self._definitions:
            made["$defs"] = {name: self._definition(name) for name in self._definitions}
        if random.random() < 0.3:
            made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        return made

    def _definition(self, name: str) -> dict[str, Any]:
        others, self._definitions = self._definitions, []
        made = self._object(1)
        if self._random.random() < 0.3:  # a list of its own kind, or a chain that ends
            made.setdefault("properties", {})["next"] = {
                "anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]
            }
        self._definitions = others
        return made

    def _any(self, depth: int) -> dict[str, Any]:
        random = self._random
        simple = [
            self._string,
            self._string,
            self._number,
            self._integer,
            self._enum,
            self._const,
            self._flag,
        ]
        nested = [self._object, self._array, self._array, self._union, self._optional, self._several]
        made = random.choice([*nested, *simple] if depth else simple)
        if self._definitions and random.random() < 0.2:
            return {"$ref": f"#/$defs/{random.choice(self._definitions)}"}
        found = made(depth - 1) if made in nested else made(0)
        if random.random() < 0.2:
            found["description"] = "what it is about"
        return found

    def _object(self, depth: int) -> dict[str, Any]:
        random = self._random
        if random.random() < 0.1:
            return random.choice(
                [
                    {"type": "object", "additionalProperties": self._any(0), "maxProperties": 3},
                    {"type": "object", "patternProperties": {r"^x_[a-z]+$": self._any(0)}},
                    {"type": "object", "propertyNames": {"pattern": r"^[a-z]{1,4}$"}, "maxProperties": 2},
                ]
            )  # fmt: skip
        names = random.sample(NAMES, random.randint(1, 5))
        made: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        if random.random() < 0.8:
            made["required"] = random.sample(names, random.randint(0, len(names)))
        if random.random() < 0.5:
            made["additionalProperties"] = random.choice([False, False, True, {"type": "integer"}])
        if random.random() < 0.1 and not made.get("additionalProperties"):
            made["minProperties"] = random.randint(1, len(names))
        if random.random() < 0.1:
            made["maxProperties"] = random.randint(len(made.get("required", names)), len(names) + 1)
        return made

    def _array(self, depth: int) -> dict[str, Any]:
        random = self._random
        if random.random() < 0.2:
            first = [self._any(depth) for _ in range(random.randint(1, 3))]
            return {"type": "array", "prefixItems": first, "items": random.choice([False, self._any(depth)])}
        made: dict[str, Any] = {"type": "array", "items": self._any(depth)}
        least = random.randint(0, 2)
        if random.random() < 0.5:
            made["minItems"] = least
        if random.random() < 0.6:
            made["maxItems"] = least + random.randint(0, 3)
        return made

    def _union(self, depth: int) -> dict[str, Any]:
        random = self._random
        if random.random() < 0.5:
            return {"anyOf": [self._any(depth) for _ in range(random.randint(1, 3))]}
        kinds = random.sample(["circle", "square", "line"], 2)
        branches = []
        for kind in kinds:
            branch = self._object(0)
            branch = {"type": "object", "properties": {"kind": {"const": kind}, "size": self._number(0)}}
            branches.append({**branch, "required": ["kind", "size"], "additionalProperties": False})
        return {"oneOf": branches}

    def _optional(self, depth: int) -> dict[str, Any]:
        random = self._random
        if random.random() < 0.5:
            return {"anyOf": [self._any(depth), {"type": "null"}], "default": None}
        return {"type": [random.choice(["string", "integer", "number", "boolean"]), "null"]}

    def _several(self, depth: int) -> dict[str, Any]:
        """Keywords beside anyOf, allOf or a reference, which apply as well."""
        random = self._random
        first = {"type": "object", "properties": {"a": self._any(depth), "b": self._integer(0)}}
        if random.random() < 0.5:
            return {**first, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
        return {"allOf": [first, {"properties": {"c": self._string(0)}, "required": ["c"]}]}

    def _string(self, depth: int) -> dict[str, Any]:
        random = self._random
        made: dict[str, Any] = {"type": "string"}
        match random.randrange(5):
            case 0:
                made["pattern"] = random.choice(PATTERNS)
            case 1:
                made["format"] = random.choice(FORMATS)
            case 2:
                made["maxLength"] = random.choice([0, 1, 5, 40])
            case 3:
                made |= {"minLength": random.randint(0, 4), "maxLength": random.randint(4, 30)}
        return made

    def _bounds(self, made: dict[str, Any], draw: Any) -> dict[str, Any]:
        low, high = sorted((draw(), draw()))
        if self._random.random() < 0.5:
            made[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._random.random() < 0.5:
            made[self._random.choice(["maximum", "exclusiveMaximum"])] = high + 2
        return made

    def _integer(self, depth: int) -> dict[str, Any]:
        random = self._random
        reach = random.choice([3, 150, 10**6, 2**40])
        return self._bounds({"type": "integer"}, lambda: random.randint(-reach, reach))

    def _number(self, depth: int) -> dict[str, Any]:
        random = self._random
        digits, reach = random.choice([(0, 5), (1, 10), (2, 1000), (8, 1), (3, 10**7)])
        return self._bounds({"type": "number"}, lambda: round(random.uniform(-reach, reach), digits))

    def _enum(self, depth: int) -> dict[str, Any]:
        random = self._random
        if random.random() < 0.7:
            return {"type": "string", "enum": random.sample(WORDS, random.randint(1, 4))}
        return {"enum": random.sample([1, 2.5, None, True, "x", -1e-7, 10**12], random.randint(1, 4))}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self._random.choice([*WORDS, 0, 1.5, True, None, [1, {"a": []}]])}

    def _flag(self, depth: int) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", "boolean"])}


@dataclass(slots=True)
class Verdict:
    """The results for some schemas."""

    num_valid: int = 0
    refused: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Schemas that have no grammar, and the reason that was given."""
    unfinished: list[dict[str, Any]] = field(default_factory=list)
    """Schemas whose output did not end within ``max_tokens``, so that it could not be checked."""
    invalid: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)
    """(schema, output, what the validator says)."""


def judge(llm: LLM, schemas: Sequence[dict[str, Any]], *, max_tokens: int, temperature: float) -> Verdict:
    """Generate under each schema with ``llm``, in one batch, and validate with ``jsonschema``, with formats checked."""
    import jsonschema

    tokenizer = llm.get_tokenizer()
    ends = {
        ids[0]: 6.0 for text in CLOSERS if len(ids := tokenizer.encode(text, add_special_tokens=False)) == 1
    }
    verdict = Verdict()
    wanted: list[SamplingParams] = []
    kept: list[dict[str, Any]] = []
    for index, schema in enumerate(schemas):
        params = SamplingParams(
            temperature=temperature,
            seed=index,
            max_tokens=max_tokens,
            logit_bias=ends,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        try:
            llm.llm_engine.grammars.compile(params.structured_outputs)  # type: ignore[arg-type]
        except ParameterError as error:
            verdict.refused.append((schema, str(error)))
            continue
        wanted.append(params)
        kept.append(schema)
    outputs = llm.generate(["Some JSON:"] * len(wanted), wanted, use_tqdm=False)
    for schema, output in zip(kept, outputs, strict=True):
        (completion,) = output.outputs
        if completion.finish_reason != "stop":
            verdict.unfinished.append(schema)
            continue
        try:
            checker = jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            checker.validate(json.loads(completion.text))
        except (ValueError, jsonschema.ValidationError) as error:
            verdict.invalid.append((schema, completion.text, str(error).splitlines()[0]))
        else:
            verdict.num_valid += 1
    return verdict
