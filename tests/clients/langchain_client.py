import sys
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

picture = sys.stdin.read()
llm = ChatOpenAI(model="demo", base_url=f"{sys.argv[1]}/v1", api_key="any", temperature=0, max_tokens=100)


def ask(text: str) -> list[HumanMessage]:
    return [HumanMessage([{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}])]


whole = llm.invoke(ask("What is in the picture?"))
assert "penguin" in whole.content, whole
assert whole.usage_metadata["input_tokens"] > 256
streamed = "".join(chunk.content for chunk in llm.stream(ask("What is in the picture?")))
assert streamed == whole.content
standard = HumanMessage(
    [
        {"type": "text", "text": "What is in the picture?"},
        {"type": "image", "base64": picture.partition(",")[2], "mime_type": "image/png"},
    ]
)
assert "penguin" in llm.invoke([standard]).content


class Count(BaseModel):
    """How many there are."""

    animal: Literal["dog", "elephant", "penguin"]
    many: bool


for method in ("json_schema", "function_calling"):
    told = llm.with_structured_output(Count, method=method, include_raw=True).invoke(ask("Is there a dog?"))
    found = told["parsed"]
    assert isinstance(found, Count), (method, told)


@tool
def report(animal: Literal["dog", "elephant"]) -> str:
    """Report an animal."""
    return animal


called = llm.bind_tools([report], tool_choice="any").invoke(ask("What is in the picture?"))
assert called.tool_calls[0]["name"] == "report", called

responses = ChatOpenAI(
    model="demo", base_url=f"{sys.argv[1]}/v1", api_key="any", temperature=0, max_tokens=100, use_responses_api=True
)
assert responses.invoke(ask("What is in the picture?")).text == whole.content
assert "".join(chunk.text for chunk in responses.stream(ask("What is in the picture?"))) == whole.content
found = responses.with_structured_output(Count, method="json_schema").invoke(ask("Is there a dog?"))
assert isinstance(found, Count), found
