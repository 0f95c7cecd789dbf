"""What a Hugging Face directory's small JSON files say about the tokens that stand for no text.

The files of a tokenizer are held in memory, by name; every message begins with the name of the file
that is wrong.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxformer.errors import DataError

Files = Mapping[str, bytes]
CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MAX_IDS = 2**22
"""Ids are below this, sixteen times the largest vocabulary there is; arrays are made that long."""
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class AddedToken(NamedTuple):
    """A token that is found in the text as it is, before anything else is tokenised."""

    content: str
    special: bool = True
    """Whether it stands for no text."""
    lstrip: bool = False
    """Whether white space before it is taken with it."""
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Anything that native code or JSON raises is a fault of the file `name`."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Rust's panics are no Exceptions
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise DataError(f"{name} cannot be used ({why}); download it again.") from None


def read_text(files: Files, name: str) -> str:
    """The text of a file; empty if there is none."""
    with refusing(name):
        return files.get(name, b"").decode()


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The JSON object of a file; empty if there is none."""
    with refusing(name):
        value = json.loads(read_text(files, name) or "{}")
    if not isinstance(value, dict):
        raise DataError(f"{name} holds no JSON object; download it again.")
    return value


def read_vocabulary(files: Files, name: str) -> dict[str, int]:
    """The ids of tokens in a JSON file; empty if there is none."""
    vocabulary = read_json(files, name)
    for token, i in vocabulary.items():
        check_id(i, f"{name}: the id of {token!r}")
    return vocabulary


def check_id(value: Any, what: str) -> int:
    """`value`, which must be an id."""
    if type(value) is not int or not 0 <= value < MAX_IDS:
        raise DataError(f"{what} is {value!r}, no id from 0 to {MAX_IDS - 1}.")
    return value


def token(value: Any, what: str) -> AddedToken | None:
    """The token that a setting describes, by its content alone or with its properties."""
    match value:
        case None | "":
            return None
        case str():
            return AddedToken(value)
        case {"content": str(content), **rest} if content:
            given = {name: rest[name] for name in AddedToken._fields if name in rest}
            if all(isinstance(flag, bool) for flag in given.values()):
                return AddedToken(content, **given)
    raise DataError(f"{what} describes no token.")


def role_tokens(files: Files) -> dict[str, AddedToken]:
    """The token of each role (bos, eos, ...) that is given one."""
    found = {}
    for name in (SPECIALS, CONFIG):  # the second has the last word
        fields = read_json(files, name)
        for role in ROLES:
            if (given := token(fields.get(f"{role}_token"), f"{name}: {role}_token")) is not None:
                found[role] = given._replace(special=True)
    return found


def extra_tokens(files: Files) -> list[AddedToken]:
    """Special tokens that have no role."""
    found = []
    for name in (SPECIALS, CONFIG):
        fields = read_json(files, name)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = fields.get(key) or []
            if isinstance(listed, dict):
                listed = [*listed.values()]
            if not isinstance(listed, list):
                raise DataError(f"{name}: {key} is no list.")
            found += [token(value, f"{name}: {key}") for value in listed]
    return [given._replace(special=True) for given in found if given is not None]


def added_tokens(files: Files) -> dict[int, AddedToken]:
    """The tokens that are given an id besides the vocabulary, by their ids in order."""
    named = {t.content: t for t in [*role_tokens(files).values(), *extra_tokens(files)]}
    found = {
        i: named.get(content, AddedToken(content, special=False))
        for content, i in read_vocabulary(files, ADDED).items()
        if content
    }
    listed = read_json(files, CONFIG).get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise DataError(f"{CONFIG}: added_tokens_decoder is no object.")
    for key, value in listed.items():
        what = f"{CONFIG}: added_tokens_decoder {key!r}"
        i = check_id(int(key) if key.isdecimal() and len(key) < 10 else key, what)
        if (given := token(value, what)) is not None:
            special = given.special and isinstance(value, dict) and value.get("special") is True
            found[i] = given._replace(special=special or given.content in named)
    return dict(sorted(found.items()))


def setting(files: Files, name: str, default: Any) -> Any:
    """A setting of the tokenizer's config; `default`, whose type it must have, if it is not set."""
    value = read_json(files, CONFIG).get(name)
    if value is None:
        return default
    if not isinstance(value, type(default)):
        raise DataError(f"{CONFIG}: {name} is {value!r}; it must be a {type(default).__name__}.")
    return value
