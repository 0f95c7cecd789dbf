"""Chat templates render as their writers meant, and reach nothing else."""

import json
import tracemalloc

import pytest

from jaxformer.data.chat import MAX_TEXT, render_chat
from jaxformer.data.tokenizer import ByteTokenizer
from jaxformer.errors import DataError

TALK = [
    {"role": "user", "content": "Hi <b> & {{ bos_token }}"},
    {"role": "assistant", "content": "é"},
]


def render(template: str, **options: bool) -> str:
    return render_chat(
        template, TALK, specials={"bos_token": "<s>"},
        **{"add_generation_prompt": False, **options},
    )  # fmt: skip


def test_messages_and_special_tokens_are_there_and_nothing_is_escaped():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m['content'] }}]{% endfor %}"
    )
    assert render(template) == "<s>[user: Hi <b> & {{ bos_token }}][assistant: é]"


def test_blocks_leave_no_lines_and_loops_can_be_left():
    template = "{% for m in messages %}\n  {% break %}\n{% endfor %}\nend"
    assert render(template) == "end"
    assert render("{% if add_generation_prompt %}go{% endif %}", add_generation_prompt=True) == "go"


def test_what_templates_call():
    assert render("{{ messages | tojson }}") == json.dumps(TALK, ensure_ascii=False)
    assert render("{{ messages[1] | tojson(indent=2) }}") == json.dumps(
        TALK[1], ensure_ascii=False, indent=2
    )
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% generation %}a{{ messages[1].content }}{% endgeneration %}b") == "aéb"
    assert render("{{ tools is none and documents is none }}{{ unknown }}") == "True"
    counting = (
        "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}"
    )
    assert render(counting + "{{ n.i }}") == "2"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_reach_no_python(template: str):
    try:
        text = render(template)
    except DataError:
        return
    assert text == ""  # what is not there renders as nothing


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ 1 / 0 }}", "{{ messages[9].content.x }}", "{{ raise_exception('no') }}",
     "{% endfor %}", "{{ nothing() }}", "{{ 'a' + 1 }}", "{" * 100_000, "{{ " + "(" * 5000],
)  # fmt: skip
def test_wrong_templates_are_refused(template: str):
    if template.startswith("{{{{"):
        assert render(template.replace("{{", "")) == ""
        return
    with pytest.raises(DataError, match="chat template"):
        render(template)


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 20000000 }}", "{{ 20000000 * 'a' }}", "{{ [1] * 10**9 }}", "{{ 2 ** (10**9) }}",
     "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}"],
)  # fmt: skip
def test_a_template_cannot_fill_the_memory(template: str):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="longer than"):
            render(template)
        assert tracemalloc.get_traced_memory()[1] < 5 * MAX_TEXT
    finally:
        tracemalloc.stop()
    assert render("{{ 'a' * 3 }}{{ 2 * 3 }}{{ 2 ** 3 }}") == "aaa68"


def test_what_a_template_says_reaches_the_user():
    with pytest.raises(DataError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_messages_are_strings():
    with pytest.raises(DataError, match="message 0"):
        render_chat("", [{"role": "user", "content": 5}], add_generation_prompt=True, specials={})


def test_without_a_template_there_is_no_chat():
    with pytest.raises(DataError, match="no chat template"):
        ByteTokenizer().chat(TALK)
