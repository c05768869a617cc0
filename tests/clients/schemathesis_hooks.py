"""What every question needs, put where a body has it; the other fields stay as drawn."""

import schemathesis

NEEDED = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is in the picture?"}],
    "prompt": "a red",
    "input": "a red circle",
    "question": "What is it?",
    "choices": ["a dog", "a cat"],
    "query": "a red circle",
    "documents": ["a circle", "a dog"],
    "text_1": "a red circle",
    "text_2": ["a circle", "a dog"],
}
SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        body = {name: NEEDED.get(name, value) for name, value in body.items()}
        body |= {name: 4 for name in SHORT if name in body}
    return body
