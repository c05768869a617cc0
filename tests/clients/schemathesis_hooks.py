"""What every question needs, put where a body has it, and two of the other fields as they were drawn.

With all of them one is wrong nearly always, and the others are never looked at.
"""

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
    if not isinstance(body, dict):
        return body
    others = [name for name in body if name not in NEEDED]
    first = len(repr(body)) % max(1, len(others))  # any of them, and the same ones whenever this body is drawn
    kept = {name: body[name] for name in others[first : first + 2]}
    return {name: NEEDED[name] for name in body if name in NEEDED} | kept | {name: 4 for name in SHORT if name in kept}
