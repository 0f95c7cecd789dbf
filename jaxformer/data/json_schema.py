"""JSON Schema as a regular expression over JSON texts.

What a regular language cannot say, or this does not know, is refused and never ignored.
"""

import json
import math
import re
from typing import Any

from jaxformer.data.regular import from_regex
from jaxformer.errors import ConfigError

MAX_DEPTH = 12
MAX_LENGTH = 2**20
"""Characters of the expression."""
GAP = " ?"
"""What may stand between a comma or colon and what follows: one space."""
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-cefA-CEF][0-9a-fA-F]{3})'
"""Of a string; no escaped surrogates."""
INTEGER = r"-?(?:0|[1-9][0-9]{0,17})"
NUMBER = INTEGER + r"(?:\.[0-9]{1,17})?(?:[eE][+-]?[0-9]{1,2})?"
SCALARS = {
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": "(?:true|false)",
    "null": "null",
}
TYPES = {"null": type(None), "boolean": bool, "integer": int, "number": (int, float),
         "string": str, "array": list, "object": dict}  # fmt: skip
NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs",
         "definitions", "deprecated", "readOnly", "writeOnly"}  # fmt: skip
"""Keywords that say nothing about what is valid."""


def to_regex(text: str) -> str:
    """The regular expression of a schema, given as JSON.

    Objects have their properties in the order of the schema, and no others. Raises `ConfigError`,
    saying where, for what is malformed, recursive or not known here.
    """
    try:
        schema = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"json_schema is not JSON ({e}).") from None
    return _Writer(schema).value(schema, "#", 0)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is no number of JSON, or too large")
    return value


class _Writer:
    def __init__(self, root: Any) -> None:
        self.root = root

    def value(self, schema: Any, at: str, depth: int) -> str:
        """The expression of the schema that stands at `at`."""
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"json_schema: {at} is over {MAX_DEPTH} deep, or recursive, which no finite "
                "automaton accepts; write the levels out."
            )
        if not isinstance(schema, dict):
            raise ConfigError(f"json_schema: {at} is {schema!r:.80}; give an object with a type.")
        found = self._value({k: v for k, v in schema.items() if k not in NOTES}, at, depth)
        if len(found) > MAX_LENGTH:
            raise ConfigError(f"json_schema: {at} is too large; make it smaller.")
        return found

    def _value(self, schema: dict[str, Any], at: str, depth: int) -> str:
        match schema:
            case {"$ref": str(target), **rest} if not rest:
                return self.value(self._resolve(target, at), target, depth + 1)
            case {"const": value, **rest} if rest.keys() <= {"type"}:
                return _either(self._of_type([value], rest, at))
            case {"enum": list(values), **rest} if values and rest.keys() <= {"type"}:
                return _either(self._of_type(values, rest, at))
            case {"anyOf": list(options), **rest} if options and not rest:
                return _either(
                    self.value(o, f"{at}/anyOf/{i}", depth + 1) for i, o in enumerate(options)
                )
            case {"type": list(kinds), **rest} if kinds and not rest:
                return _either(self.value({"type": k}, at, depth + 1) for k in kinds)
            case {"type": str(kind), **rest} if kind in SCALARS and not rest:
                return SCALARS[kind]
            case {"type": "string", "pattern": str(pattern), **rest} if not rest:
                return self._pattern(pattern, at)
            case {"type": "string", **rest} if rest.keys() <= {"minLength", "maxLength"}:
                return f'"{CHARACTER}{_times(rest, "minLength", "maxLength", at)}"'
            case {"type": "array", "items": items, **rest} if rest.keys() <= {
                "minItems", "maxItems"
            }:  # fmt: skip
                return self._array(items, rest, at, depth)
            case {"type": "object", "properties": dict(properties), **rest} if properties and (
                rest.keys() <= {"required", "additionalProperties"}
                and rest.get("additionalProperties", False) is False
            ):
                return self._object(properties, rest.get("required", []), at, depth)
        raise ConfigError(
            f"json_schema: {at} has {', '.join(sorted(schema)) or 'nothing'}, which together are "
            "not known here; use type (string with minLength, maxLength or pattern; number, "
            "integer, boolean, null; array with items, minItems, maxItems; object with properties, "
            "required, additionalProperties false), enum, const, anyOf or $ref."
        )

    def _of_type(self, values: list[Any], rest: dict[str, Any], at: str) -> list[str]:
        """Those of `values` that are of the type in `rest`, if there is one."""
        named = rest.get("type", list(TYPES))
        kinds = named if isinstance(named, list) else [named]
        found = [_literal(value) for value in values if any(_is(value, kind) for kind in kinds)]
        if not found:
            raise ConfigError(
                f"json_schema: {at}: no value of {values!r:.80} is of type {named!r}."
            )
        return found

    def _resolve(self, target: str, at: str) -> Any:
        found = self.root
        for part in target.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                found = None
                break
            found = found[name]
        if found is None or not target.startswith("#"):
            raise ConfigError(f"json_schema: {at} refers to {target!r}, which is not there.")
        return found

    def _pattern(self, pattern: str, at: str) -> str:
        inner = pattern.removeprefix("^").removesuffix("$")
        if pattern != f"^{inner}$" or inner.endswith("\\"):
            raise ConfigError(f"json_schema: {at}: begin the pattern with ^ and end it with $.")
        escaped = [ord('"'), ord("\\"), *range(0x20)]
        if (from_regex(pattern).following[:, escaped] >= 0).any():
            raise ConfigError(
                f"json_schema: {at}: the pattern {pattern[:80]!r} may match quotes, backslashes or "
                "control characters, which JSON escapes; leave them out of it."
            )
        return f'"(?:{inner})"'

    def _array(self, items: Any, rest: dict[str, Any], at: str, depth: int) -> str:
        item = self.value(items, f"{at}/items", depth + 1)
        least, most = _bounds(rest, "minItems", "maxItems", at)
        if most == 0:
            return r"\[\]"
        upper = "" if most is None else most - 1
        some = rf"\[{item}(?:,{GAP}{item}){{{max(least - 1, 0)},{upper}}}\]"
        return some if least else rf"(?:\[\]|{some})"

    def _object(self, properties: dict[str, Any], required: Any, at: str, depth: int) -> str:
        if not isinstance(required, list) or not all(
            isinstance(name, str) and name in properties for name in required
        ):
            raise ConfigError(f"json_schema: {at}/required must list names of its properties.")
        fields = [
            (
                f"{_literal(name)}:{GAP}{self.value(inner, f'{at}/properties/{name}', depth + 1)}",
                name in required,
            )
            for name, inner in properties.items()
        ]
        # What may come from each field on, after another one or as the first.
        after = first = ""
        for field, must in reversed(fields):
            after, first = (
                f",{GAP}{field}{after}" if must else f"(?:,{GAP}{field})?{after}",
                f"{field}{after}" if must else f"(?:{field}{after}|{first})",
            )
        return rf"\{{{first}\}}"


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of JSON Schema, where 1.0 is an integer and true is none."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(kind, str) and isinstance(value, TYPES.get(kind, ()))


def _literal(value: Any) -> str:
    """JSON of a value, spaced as elsewhere."""
    match value:
        case dict():
            inner = f",{GAP}".join(f"{_literal(k)}:{GAP}{_literal(v)}" for k, v in value.items())
            return rf"\{{{inner}\}}"
        case list():
            return rf"\[{f',{GAP}'.join(map(_literal, value))}\]"
    return re.escape(json.dumps(value, ensure_ascii=False))


def _either(options: Any) -> str:
    return f"(?:{'|'.join(options)})"


def _bounds(rest: dict[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
    least, most = rest.get(low, 0), rest.get(high)
    if type(least) is not int or least < 0 or not (
        most is None or (type(most) is int and most >= least)
    ):  # fmt: skip
        raise ConfigError(f"json_schema: {at} has {low} {least!r} and {high} {most!r}.")
    return least, most


def _times(rest: dict[str, Any], low: str, high: str, at: str) -> str:
    least, most = _bounds(rest, low, high, at)
    return f"{{{least},{'' if most is None else most}}}"
