"""Templates from afar: the same text as here, and an end to those that compute too much."""

from __future__ import annotations

import time

import pytest

from opsin.errors import RequestError
from opsin.processing import isolated
from opsin.processing.isolated import IsolatedTemplate
from opsin.processing.jinja import ChatTemplate

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Grüße \ufdd0x\ufdd1 {{ 1 }}"}]}]
TEMPLATE = "{{ bos }}{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}{{ colour }}"
TOKENS = {"bos": "<s>"}


def test_isolated_template_says_what_it_says_here():
    here, there = ChatTemplate(TEMPLATE, TOKENS), IsolatedTemplate(TEMPLATE, TOKENS)
    assert there.content_format == here.content_format == "openai"
    options = {"kwargs": {"colour": "red"}, "add_generation_prompt": True}
    assert there.render(MESSAGES, **options) == here.render(MESSAGES, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no systems') }}", "no systems"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "not valid jinja"),
        ("{{ '%0999999999d' % 1 }}", "took too much memory"),
    ],
)
def test_what_a_template_does_wrong_is_told(template: str, message: str):
    with pytest.raises(RequestError, match=message):
        IsolatedTemplate(template, TOKENS).render(MESSAGES)


ENDLESS = "{% set n = range(99999) | list %}{% for a in n %}{% for b in n %}{% for c in n %}" + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [ENDLESS, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"],
    ids=["that looks at nothing", "loops"],
)
def test_template_that_computes_without_end_is_killed(template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isolated, "DEADLINE_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 0\.5 s") as refusal:
        IsolatedTemplate(template, TOKENS).render(MESSAGES)
    assert refusal.value.param == "chat_template"
    assert time.monotonic() - begun < 3
