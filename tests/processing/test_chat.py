from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.processing.jinja import find_template
from opsin.processing.processor import InputProcessor
from opsin.processing.prompts import Prompt, open_reference

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (40, 30), "blue")
URL = "https://example.org/a.png"
LLAVA = find_template(None, None, "llava")
TEXT = {"type": "text", "text": "What?"}
IMAGE_ID = 4


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def pil(image: Image.Image = RED) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": image}


def token_ids(processor: InputProcessor, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    chat = processor.prompts.render_chat(messages, **options)
    media = [open_reference(reference, None, processor.prompts.opener()) for reference in chat.media]
    prompt = Prompt(chat.prompt, media=media, add_special_tokens=chat.add_special_tokens)
    return processor.process("r", prompt, SamplingParams()).request.prompt_token_ids


EMBEDS = torch.zeros(16, 64)
ARRAY = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("part", "value", "uuid"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, URL, None),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}, "uuid": "u"}, URL, "u"),
        ({"image_url": URL}, URL, None),
        ({"image_url": {"url": URL}}, URL, None),
        ({"type": "input_image", "image_url": URL}, URL, None),
        ({"type": "image", "image": ARRAY}, ARRAY, None),
        ({"type": "image", "url": URL}, URL, None),
        ({"type": "image_pil", "image_pil": RED}, RED, None),
        ({"type": "image_embeds", "image_embeds": EMBEDS}, EMBEDS, None),
        ({"type": "image_url", "image_url": None, "uuid": "u"}, None, "u"),
        ({"type": "image_url", "image_url": {}, "uuid": "u"}, None, "u"),
        ({"type": "image_pil", "image_pil": None, "uuid": "u"}, None, "u"),
    ],
)
def test_every_form_of_picture_part_is_read(
    processor: InputProcessor, part: dict[str, Any], value: Any, uuid: str | None
) -> None:
    (reference,) = processor.prompts.render_chat(user(TEXT, part)).media
    assert reference.value is value or reference.value == value
    assert (reference.modality, reference.uuid) == ("image", uuid)
    assert reference.param.startswith("messages.0.content.1.")  # and then the part's own key
    assert reference.is_embedding == (part.get("type") == "image_embeds")


@pytest.mark.parametrize("part", ["What?", TEXT, {"type": "input_text", "text": "What?"}, {"text": "What?"}], ids=str)
def test_every_form_of_text_part_is_read(processor: InputProcessor, part: Any) -> None:
    expected = processor.prompts.render_chat([{"role": "user", "content": "What?"}])
    assert processor.prompts.render_chat(user(part)) == expected
    assert "What?" in expected.prompt.text


BAD = [
    ([], "messages must be a non-empty list of {'role', 'content'} objects, got an empty list.", "messages"),
    (["hi"], "A message must be an object with 'role' and 'content', got str.", "messages.0"),
    ([{"role": "im_end", "content": "x"}],
     "role is 'im_end'; it must be one of system, developer, user, assistant, tool, function.", "messages.0.role"),
    ([{"role": "user"}], "A user message must have content: text or a list of parts.", "messages.0.content"),
    ([{"role": "user", "content": 3}], "content must be text or a list of parts, got int.", "messages.0.content"),
    (user(3), "A content part must be text or an object with a 'type', got int.", "messages.0.content.0"),
    (user({"type": "text"}), "A part of type 'text' must have 'text', a string; got null.", "messages.0.content.0"),
    (user(TEXT, {"type": "audio_url", "audio_url": {"url": URL}}),
     "Content part type 'audio_url' is unknown; use one of text, input_text, output_text, refusal, image_url, "
     "input_image, image, image_pil, image_embeds, video_url, input_video, video.", "messages.0.content.1"),
    (user({"type": ["x"]}),
     "Content part type ['x'] is unknown; use one of text, input_text, output_text, refusal, image_url, "
     "input_image, image, image_pil, image_embeds, video_url, input_video, video.", "messages.0.content.0"),
    (user({"type": "image_url", "image_url": URL}),
     'image_url must be an object: {"type": "image_url", "image_url": {"url": "..."}}; got a bare string.',
     "messages.0.content.0"),
    (user({"type": "image_url", "image_url": {"url": 7}}),
     "The url of a part of type 'image_url' must be a non-empty string, got int.", "messages.0.content.0"),
    (user({"type": "image_pil"}), "A part of type 'image_pil' must have a value under 'image_pil'.",
     "messages.0.content.0"),
    (user({"type": "image_pil", "image_pil": RED, "uuid": 3}), "uuid must be a non-empty string, got int.",
     "messages.0.content.0.uuid"),
    (user(*[pil()] * 5), "At most 4 image(s) may be provided in one prompt. This prompt has 5: send fewer, or start "
     "with limit_mm_per_prompt={'image': 5}.", "messages"),
    (user({"type": "video_url", "video_url": {"url": URL}}),
     "At most 0 video(s) may be provided in one prompt. This model takes none.", "messages"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "arguments are not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
     "messages.0.tool_calls.0.function.arguments"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message", "param"), BAD)
def test_bad_message_is_refused_with_its_path(
    processor: InputProcessor, messages: Any, message: str, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        processor.prompts.render_chat(messages)
    assert str(caught.value) == message
    assert caught.value.param == param


def test_bad_picture_in_a_message_is_refused_with_its_path(processor: InputProcessor) -> None:
    chat = processor.prompts.render_chat(user(TEXT, {"type": "image", "image": b"junk"}))
    with pytest.raises(RequestError, match="not a picture") as caught:
        open_reference(chat.media[0], None, processor.prompts.opener())
    assert caught.value.param == "messages.0.content.1.image"
    nameless = processor.prompts.render_chat(user({"type": "image_pil", "uuid": "u"})).media[0]
    with pytest.raises(RequestError, match="must be sent with every request"):
        open_reference(nameless, None, processor.prompts.opener())


def test_token_ids_equal_the_huggingface_processors_chat(processor: InputProcessor, folder: Path) -> None:
    def messages(**image: Any) -> list[dict[str, Any]]:
        first = [{"type": "text", "text": "Which? "}, {"type": "image", **image}, {"type": "text", "text": " é"}]
        return [
            {"role": "user", "content": first},
            {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
            {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "And this?"}]},
        ]

    hf: Any = LlavaProcessor.from_pretrained(folder)
    expected = hf.apply_chat_template(messages(image=RED), add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ][0]
    assert token_ids(processor, messages(image=RED)) == list(expected)
    assert list(expected).count(IMAGE_ID) == 32


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ([TEXT, pil()], "USER: <image>\nWhat?\nASSISTANT:"),
        ([pil(), TEXT], "USER: <image>\nWhat?\nASSISTANT:"),
        ([TEXT, pil(), pil(BLUE)], "USER: <image>\n<image>\nWhat?\nASSISTANT:"),
        (["a", "b", pil()], "USER: <image>\na\nb\nASSISTANT:"),
        (["a", pil(), "b"], "USER: a\n<image>\nb\nASSISTANT:"),
        ([pil(), "a", pil(), "b"], "USER: <image>\na\n<image>\nb\nASSISTANT:"),
        ([pil()], "USER: <image>\nASSISTANT:"),
    ],
)
def test_string_template_gets_placeholders_in_front_unless_interleaved(
    processor: InputProcessor, content: list[Any], prompt: str
) -> None:
    chat = processor.prompts.render_chat(user(*content), chat_template=LLAVA)
    assert chat.prompt.text == prompt
    assert not chat.prompt.plain
    assert len(chat.media) == prompt.count("<image>")


@pytest.mark.parametrize("template", [None, LLAVA], ids=["openai", "string"])
def test_placeholder_in_a_users_text_is_text(processor: InputProcessor, template: str | None) -> None:
    # As itself, split over two parts, and in the assistant's earlier words.
    messages = [
        *user({"type": "text", "text": "an <image> tag </s> and <ima"}, "ge>", pil()),
        {"role": "assistant", "content": "<image>"},
        *user("<image>" * 3),
    ]
    ids = token_ids(processor, messages, chat_template=template)
    assert ids.count(IMAGE_ID) == 16
    text = processor.tokenizer.decode(ids)
    assert text.count("<image>") == (6 if template is None else 5)  # the parts are joined by a newline there
    assert "tag </s> and" in text


def test_chat_without_any_template_says_what_to_do(
    make_processor: Callable[..., InputProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_processor()
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    bare = make_processor(folder=None)
    with pytest.raises(RequestError, match=r"This model has no chat template\. Give one"):
        bare.prompts.render_chat(user("hi"))
    shipped = make_processor(folder=None, family="llava")
    assert shipped.prompts.render_chat(user("hi")).prompt.text == "USER: hi\nASSISTANT:"
    given = make_processor(folder=None, chat_template="{{ messages[0].content }}!")
    assert given.prompts.render_chat(user("hi")).prompt.text == "hi!"


def test_template_that_drops_a_picture_is_noticed(processor: InputProcessor) -> None:
    with pytest.raises(RequestError, match=r"has 0 image placeholder\(s\) but 1 image\(s\) were given"):
        token_ids(processor, user(TEXT, pil()), chat_template="{{ bos_token }}nothing")


def test_begin_token_is_added_once(processor: InputProcessor) -> None:
    for template in ("{{ bos_token }}x", "x"):
        ids = token_ids(processor, user("hi"), chat_template=template)
        assert ids == processor.tokenizer.encode("x")
        assert ids[0] == 1
