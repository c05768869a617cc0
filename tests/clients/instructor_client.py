import sys
from typing import Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel

picture = sys.stdin.read()
plain = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="any")


class Animal(BaseModel):
    kind: Literal["dog", "elephant", "penguin"]
    alone: bool


content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What animal is this?"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
    client = instructor.from_openai(plain, mode=mode)
    fields = {"model": "demo", "max_tokens": 200, "temperature": 0, "max_retries": 0}
    try:
        found = client.chat.completions.create(
            response_model=Animal, messages=[{"role": "user", "content": content}], **fields
        )
    except InstructorRetryException as error:
        # JSON mode asks for any object: its fields are up to the model, and the demo model is a small one.
        assert mode is instructor.Mode.JSON, (mode, error)
        assert "validation error" in str(error), error
    else:
        assert isinstance(found, Animal), (mode, found)
