"""Wordings: numbers of things and of letters."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "count": (
        (
            "How many {s} are there?",
            "How many {s} are in the {pic}?",
            "How many {s} do you see?",
            "Count the {s}.",
            "What is the number of {s}?",
            "How many {s} can you see?",
            "Number of {s}?",
            "How many {s} does the {pic} show?",
            "How many {s}?",
            "Tell me the number of {s}.",
            "Count the {s} in the {pic}.",
            "How many {s} can you count?",
        ),
        (
            "Can you count the {s}?",
            "How many {s} are shown?",
            "Tell me how many {s} there are.",
            "What is the number of {s} in the {pic}?",
            "How many {s} do you see in the {pic}?",
        ),
    ),
    "letters": (
        (
            "How many letters does the word have?",
            "How many letters are in the word?",
            "Count the letters of the word.",
            "What is the number of letters in the word?",
        ),
        ("How many letters are there in the word?", "Can you count the letters in the word?"),
    ),
}
