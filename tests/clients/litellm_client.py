import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read when it is imported, which would fetch prices otherwise

import litellm

picture = sys.stdin.read()
fields = {"model": "openai/demo", "api_base": f"{sys.argv[1]}/v1", "api_key": "any", "temperature": 0, "max_tokens": 32}
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is in the picture?"}]
messages = [{"role": "user", "content": content}]

whole = litellm.completion(messages=messages, **fields)
assert "penguin" in whole.choices[0].message.content, whole
streamed = "".join(
    chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=messages, stream=True, **fields)
)
assert streamed == whole.choices[0].message.content, streamed
answers = asyncio.run(litellm.acompletion(messages=messages, n=2, **fields))
assert len(answers.choices) == 2
try:
    litellm.completion(messages=messages, **{**fields, "temperature": -1})
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a bad parameter was taken")
