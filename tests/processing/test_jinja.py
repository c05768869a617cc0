from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from opsin.errors import ConfigError, RequestError
from opsin.models import resolve
from opsin.processing import jinja
from opsin.processing.jinja import ChatTemplate, find_template, read_template, shipped_templates
from tests.factory import CHAT_TEMPLATE

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' }}\n"
    "    {%- if message.content is string %}{{- message.content }}\n"
    "    {%- else %}{%- for part in message.content %}\n"
    "        {%- if part.type == 'image' or 'image' in part %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}\n"
    "        {%- elif 'text' in part %}{{- part.text }}{%- endif %}\n"
    "    {%- endfor %}{%- endif %}\n"
    "    {{- '<|im_end|>\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is false %}{{- '<think>' }}"
    "{%- endif %}{%- endif %}\n"
)
TRIMMED = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}"
    "[{{ m['role'] }}] {{ ns.system }} {% generation %}{{ m['content'] | trim }}{% endgeneration %}{{ eos_token }}\n"
    "{% endfor %}{{ {'a': ['<b>', 'é']} | tojson(indent=1) }}{% if add_generation_prompt %}[answer]{% endif %}"
)
LLAVA = find_template(None, None, "llava")
assert LLAVA is not None
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello <b> & 'you'\n"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why? "},
]
PART_TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes "}]},
]


def huggingface(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, **TOKENS, **options)
    return rendered[0]


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(
    ("source", "messages"),
    [
        pytest.param(CHATML, TEXT_TURNS, id="chatml-text"),
        pytest.param(CHATML, PART_TURNS, id="chatml-parts"),
        pytest.param(TRIMMED, TEXT_TURNS, id="trimmed"),
        pytest.param(LLAVA, TEXT_TURNS, id="llava"),
        pytest.param(CHAT_TEMPLATE, PART_TURNS, id="factory"),
    ],
)
def test_rendering_equals_transformers(source: str, messages: list[dict[str, Any]], generation: bool) -> None:
    ours = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=generation)
    assert ours == huggingface(source, messages, add_generation_prompt=generation)
    assert len(ours) > 20


WHOLE = (  # as GLM-4.1V's: parts of users, and what others say as it is
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'user' %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("continues", [False, True])
def test_parts_that_a_template_writes_out_whole_are_their_text(continues: bool) -> None:
    turns = [
        {"role": "system", "content": "Be <b>rief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat "},
    ]
    in_parts = [
        turn if turn["role"] == "user" else {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        for turn in turns
    ]
    template = ChatTemplate(WHOLE, TOKENS)
    assert template.content_format == "openai"
    options: Any = {"add_generation_prompt": not continues, "continue_final_message": continues}
    ours = template.render(in_parts, **options)
    assert ours == huggingface(WHOLE, turns, **options)
    two = [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template.render(two, add_generation_prompt=False) == "<|system|>\na\nb"


def test_tools_and_kwargs_reach_the_template_as_in_transformers() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    ours = ChatTemplate(CHATML, TOKENS).render(TEXT_TURNS, tools=tools, kwargs={"enable_thinking": False})
    theirs = huggingface(CHATML, TEXT_TURNS, tools=tools, enable_thinking=False, add_generation_prompt=True)
    assert ours == theirs
    assert "<é>" in ours
    assert ours.endswith("<think>")


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        pytest.param(CHATML, [*TEXT_TURNS[:2], {"role": "assistant", "content": "So I "}], id="kept"),
        pytest.param(TRIMMED, [*TEXT_TURNS[:2], {"role": "assistant", "content": "So I "}], id="trimmed"),
        pytest.param(CHAT_TEMPLATE, PART_TURNS, id="parts"),
    ],
)
def test_continued_final_message_equals_transformers(source: str, messages: list[dict[str, Any]]) -> None:
    ours = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == huggingface(source, messages, continue_final_message=True)
    assert ours.rstrip().endswith(("So I", "yes"))


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (CHATML, "openai"),
        (CHAT_TEMPLATE, "openai"),
        (LLAVA, "string"),
        (TRIMMED, "string"),
        ("{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(m.content) }}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c | list %}x{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}{% endfor %}{% endfor %}", "string"),
    ],
)  # fmt: skip
def test_content_format_is_read_off_the_template(source: str, form: str) -> None:
    assert ChatTemplate(source, TOKENS).content_format == form


def test_llava_template_refuses_turns_out_of_order() -> None:
    with pytest.raises(RequestError, match=r"The chat template refused the conversation: Roles must alternate"):
        ChatTemplate(LLAVA or "", TOKENS).render([TEXT_TURNS[1], TEXT_TURNS[3]])


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt", "chat_template", "bos_token"])
def test_kwargs_that_the_engine_owns_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs may not set {name}") as caught:
        ChatTemplate(CHATML, TOKENS).render(TEXT_TURNS, kwargs={name: True})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "does something unsafe"),
        ("{{ messages.append(1) }}", "does something unsafe"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "does something unsafe"),
        ("{% for m in messages %}", "not valid jinja"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.at.all }}", "refused"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "calls itself without end"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested too deeply"),
    ],
)
def test_template_that_misbehaves_fails_its_request(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(source, TOKENS).render(TEXT_TURNS)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for m in messages %}{{ m }}{% endfor %}{% for j in range(999) %}x{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["loops", "output", "macros"],
)
def test_template_of_a_checkpoint_that_computes_on_and_on_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja, "_MAX_CPU_S", 0.05)
    with pytest.raises(RequestError, match=r"computed for more than 0\.05 s") as refusal:
        ChatTemplate(source, TOKENS).render(TEXT_TURNS)
    assert refusal.value.param == "chat_template"


@pytest.mark.parametrize(
    "expression",
    ["'a' * 10**9", "10**9 * [1]", "9 ** (9 ** 8)", "(2 ** (2 ** 23)) * (2 ** (2 ** 23))"],
)
def test_template_that_makes_huge_values_is_stopped_before_it_does(expression: str) -> None:
    with pytest.raises(RequestError, match="makes a value of"):
        ChatTemplate(f"{{% set x = messages[0].n %}}{{% set y = {expression} %}}", TOKENS).render([{"role": "user"}])


def test_template_may_multiply_as_before() -> None:
    source = "{{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 * 3.5 }} {{ 3 * [1] }}"
    assert ChatTemplate(source, TOKENS).render(TEXT_TURNS) == "ababab 1024 0.5 7.0 [1, 1, 1]"


def test_continuing_and_starting_a_message_at_once_is_refused() -> None:
    with pytest.raises(RequestError, match="Set one to false"):
        ChatTemplate(CHATML, TOKENS).render(TEXT_TURNS, continue_final_message=True)


def test_template_is_found_in_the_processor_before_the_tokenizer(tmp_path: Path) -> None:
    assert find_template(tmp_path, "of tokenizer", "llava") == "of tokenizer"
    assert find_template(tmp_path, {"default": "d", "tool_use": "t"}, "", tools=True) == "t"
    assert find_template(tmp_path, {"default": "d", "tool_use": "t"}, "") == "d"
    (tmp_path / "processor_config.json").write_text('{"chat_template": "of processor"}')
    assert find_template(tmp_path, "of tokenizer", "llava") == "of processor"
    (tmp_path / "chat_template.jinja").write_text("of file")
    assert find_template(tmp_path, "of tokenizer", "llava") == "of file"
    assert find_template(None, None, "unheard-of") is None


@pytest.mark.parametrize(("tower", "expected"), [("clip_vision_model", True), ("pixtral", False)])
def test_pixtral_without_template_does_not_get_the_one_of_the_family_whose_architecture_it_has(
    tower: str, expected: bool
):
    config = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": tower}}
    assert (find_template(None, None, resolve(config).folder) is not None) == expected


def test_template_is_given_as_text_or_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_template("llava") == LLAVA
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava").write_text("{{ 2 }}")
    assert read_template("llava") == "{{ 2 }}"  # a file comes before a name
    path = tmp_path / "t.jinja"
    path.write_text("{{ 1 }}")
    assert read_template(str(path)) == read_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ConfigError, match=r"neither jinja text .* dse_qwen2_vl, llava"):
        read_template(str(tmp_path / "missing.jinja"))


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("template_*.jinja")), ids=lambda path: path.stem)
def test_template_among_the_examples_is_the_shipped_one(path: Path) -> None:
    assert read_template(path.stem.removeprefix("template_")) == path.read_text()


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_shipped_template_compiles(name: str) -> None:
    assert ChatTemplate(read_template(name), TOKENS).content_format in ("string", "openai")


def test_paligemma_has_a_template_to_fall_back_on() -> None:
    source = find_template(None, None, "paligemma")
    assert source is not None
    template = ChatTemplate(source, TOKENS)
    content = [{"type": "text", "text": "caption en"}, {"type": "image"}, {"type": "image"}]
    assert template.content_format == "openai"
    assert template.render([{"role": "user", "content": content}]) == "<image><image>caption en"
    assert template.render([{"role": "user", "content": "caption en"}]) == "caption en"


def test_dse_template_ends_in_the_token_whose_state_is_the_vector() -> None:
    template = ChatTemplate(read_template("dse_qwen2_vl"), {})
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}, {"type": "video"}, {"type": "image"}]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    user = f"<|im_start|>user\n{image}What is shown?{video}{image}<|im_end|>\n"
    messages = [{"role": "user", "content": content}]
    assert template.content_format == "openai"
    end = "<|im_start|>assistant\n<|endoftext|>"
    for generation in (True, False):
        assert template.render(messages, add_generation_prompt=generation) == system + user + end
    numbered = f"<|im_start|>user\nPicture 1: {image}What is shown?Video 1: {video}Picture 2: {image}<|im_end|>\n"
    assert template.render(messages, kwargs={"add_vision_id": True}) == system + numbered + end
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(own) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n" + end


@pytest.mark.parametrize("given", ["\0", "x" * 5000, 5], ids=["nul", "long", "number"])
def test_template_that_is_neither_text_nor_path_is_refused_in_few_words(given: Any) -> None:
    with pytest.raises(ConfigError, match="chat_template") as caught:
        read_template(given)
    assert len(str(caught.value)) < 500


def test_template_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="readable file"):
        read_template(str(path))
