"""What a schema's expression matches is valid JSON of it; what it cannot say is refused."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data.json_schema import to_regex
from jaxformer.errors import ConfigError

scalars = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string"},
        {"type": "string", "minLength": 1, "maxLength": 2, "title": "Short"},
        {"type": "string", "pattern": "^[a-c]|x+$".replace("|x+", "{2}")},
        {"enum": ["a", 1, None, [1, {"b": "c"}]]},
        {"const": 'q"\\'},
        {"$ref": "#/$defs/one"},
    ]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.dictionaries(st.sampled_from(["a", "b", "c ü"]), inner, min_size=1)
    return fields.flatmap(
        lambda properties: st.builds(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            },
            st.sets(st.sampled_from(sorted(properties))),
        )
    )


arrays = st.tuples(st.integers(0, 2), st.integers(0, 2))
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda items, n: {"type": "array", "items": items, "minItems": n[0],
                              "maxItems": sum(n)},
            inner, arrays,
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=4,
)  # fmt: skip
ONE = {"type": "array", "items": {"type": "integer"}}


def valid(value: Any, schema: Any) -> bool:
    """A plain check of the schemas above."""
    match schema:
        case {"$ref": _}:
            return valid(value, ONE)
        case {"anyOf": options}:
            return any(valid(value, option) for option in options)
        case {"enum": values}:
            return any(type(value) is type(v) and value == v for v in values)
        case {"const": v}:
            return value == v
        case {"type": "integer"}:
            return type(value) is int
        case {"type": "number"}:
            return type(value) in (int, float)
        case {"type": "boolean"}:
            return type(value) is bool
        case {"type": "null"}:
            return value is None
        case {"type": "string"}:
            return (
                isinstance(value, str)
                and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
                and bool(re.search(schema.get("pattern", ""), value))
            )
        case {"type": "array", "items": items}:
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 99)
                and all(valid(v, items) for v in value)
            )
        case {"properties": properties, "required": required}:
            return (
                isinstance(value, dict)
                and {*required} <= value.keys() <= properties.keys()
                and all(valid(v, properties[k]) for k, v in value.items())
            )
    raise AssertionError(schema)


@given(schemas, st.data())
@settings(max_examples=60, deadline=None)
def test_what_matches_is_valid(schema, data):
    pattern = to_regex(json.dumps(schema | {"$defs": {"one": ONE}}))
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    assert valid(json.loads(text), schema), text


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 10**9), st.text("ab\"\\\n é", max_size=3),
        st.sampled_from([0.5, -1e-7, 1e22]), st.sampled_from(["aa", 'q"\\', [1, {"b": "c"}], [3]]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "c ü"]), inner, max_size=3),
    ),
    max_leaves=4,
)  # fmt: skip


@given(schemas, values)
@settings(max_examples=200, deadline=None)
def test_what_is_valid_matches(schema, value):
    """As Python writes it, compactly too, its fields in the order of the schema."""
    pattern = to_regex(json.dumps(schema | {"$defs": {"one": ONE}}))
    for separators in ((", ", ": "), (",", ":")):
        text = json.dumps(_ordered(value, schema), ensure_ascii=False, separators=separators)
        assert bool(re.fullmatch(pattern, text)) == valid(value, schema), text


def _ordered(value: Any, schema: Any) -> Any:
    match value, schema:
        case _, {"anyOf": options}:
            return next((_ordered(value, o) for o in options if valid(value, o)), value)
        case list(), {"items": items}:
            return [_ordered(v, items) for v in value]
        case dict(), {"properties": properties} if value.keys() <= properties.keys():
            return {k: _ordered(value[k], s) for k, s in properties.items() if k in value}
    return value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "# is"),
        ("{}", "# has nothing"),
        ({"type": "integer", "minimum": 3}, "minimum, type"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "#/properties/a has type"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, "required"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": True},
         "additionalProperties"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": [[]]}, "required"),
        ({"type": "integer", "enum": ["a", True, 1.5]}, "no value .* is of type 'integer'"),
        ({"type": "string", "const": 5}, "no value"),
        ('{"const": NaN}', "NaN is no number of JSON"),
        ('{"const": 1e999}', "1e999 is no number of JSON, or too large"),
        ({"type": "array", "items": {"$ref": "#"}}, "recursive"),
        ({"$ref": "#/$defs/none"}, "not there"),
        ({"type": "string", "pattern": "^.$"}, "quotes"),
        ({"type": "string", "pattern": "a"}, "begin the pattern"),
        ({"type": "string", "pattern": "^a|b$"}, "anchors"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "minLength 2"),
        ({"type": "array", "items": {"type": "null"}, "minItems": -1}, "minItems -1"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_refused(schema, message):
    with pytest.raises(ConfigError, match=message):
        to_regex(schema if isinstance(schema, str) else json.dumps(schema))


def test_values_of_another_type_are_left_out():
    schema = {"type": ["integer", "null"], "enum": [1, "a", True, None, 2.0, [3]]}
    texts = ["1", '"a"', "true", "null", "2.0", "[3]"]
    pattern = to_regex(json.dumps(schema))
    assert [t for t in texts if re.fullmatch(pattern, t)] == ["1", "null", "2.0"]
