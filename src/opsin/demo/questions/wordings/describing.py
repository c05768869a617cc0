"""Wordings: everything in the picture, as a list or as a caption."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list": (
        (
            "What is in the {pic}?",
            "What's in the {pic}?",
            "What do you see?",
            "What do you see in the {pic}?",
            "What can you see?",
            "Which things are in the {pic}?",
            "List the things in the {pic}.",
            "What things are there?",
            "What is there in the {pic}?",
            "Name everything in the {pic}.",
            "What are the things in the {pic}?",
        ),
        (
            "What can you see in the {pic}?",
            "Which things do you see?",
            "Name the things in the {pic}.",
            "List everything in the {pic}.",
        ),
    ),
    "caption": (
        (
            "Describe the {pic}.",
            "Describe what you see.",
            "Describe this {pic}.",
            "Write a caption for the {pic}.",
            "Give a description of the {pic}.",
            "What does the {pic} look like?",
            "Describe the {pic} in one sentence.",
            "Can you describe this?",
            "Write a description of this {pic}.",
            "Tell me everything about the {pic}.",
            "Describe everything you see in the {pic}.",
        ),
        (
            "Can you describe the {pic}?",
            "Give a caption for this {pic}.",
            "Describe what you see in the {pic}.",
            "Write a sentence about the {pic}.",
        ),
    ),
}
