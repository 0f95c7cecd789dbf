"""A conversation to the text that a chat model continues, by the template its makers wrote.

A template is a program in a file from elsewhere: it runs in jinja2's sandbox, sees strings alone,
reaches neither Python nor the system, and writes no more than `MAX_TEXT`. How long it runs is not
bounded; Ctrl-C ends it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jaxformer.errors import DataError

MAX_TEXT = 2**24
"""Characters of a conversation, or elements of a list that its template makes."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    specials: Mapping[str, str],
) -> str:
    """The text of a conversation, each message a mapping with "role" and "content".

    `add_generation_prompt` has it end where the model is to answer; `specials` are the tokens that
    the template knows by names, as bos_token. Raises `DataError` if the template is wrong, or
    refuses the conversation.
    """
    for i, message in enumerate(messages):
        if not all(type(x) is str for pair in message.items() for x in pair):
            raise DataError(f"message {i} of the chat must have strings only, as role and content.")
    try:
        pieces = _compile(template).generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **specials,
        )
        text = ""
        for piece in pieces:
            text += piece
            _refuse_over(len(text))
        return text
    except Exception as e:  # whatever a foreign program may raise
        why = " ".join(str(e).split())[:300] or type(e).__name__
        raise DataError(
            f"the chat template cannot render this conversation: {why}. It may want other roles, "
            "or user and assistant in turn; or the template itself is wrong."
        ) from None


def _refuse_over(size: int) -> None:
    if size > MAX_TEXT:
        raise ValueError(f"it makes something longer than {MAX_TEXT}")


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The template, with the extensions that chat templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`generation` marks what an assistant said, for training; it renders as it stands."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, in which repetition and powers are no way to use up the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for many, times in ((left, right), (right, left)):
                if operator == "*" and isinstance(times, int) and hasattr(many, "__len__"):
                    _refuse_over(len(many) * times)
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                _refuse_over(left.bit_length() * right)
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # jinja2's own writes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
