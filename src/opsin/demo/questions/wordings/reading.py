"""Wordings: printed text."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read": (
        (
            "What does it say?",
            "What is written here?",
            "Read the text.",
            "What text is in the {pic}?",
            "What does the text say?",
            "What is written in the {pic}?",
            "Read this.",
            "What can you read?",
            "What is the text?",
            "Can you read this?",
            "Tell me what is written.",
            "What text do you see?",
            "Read what is written in the {pic}.",
            "What does the {pic} say?",
        ),
        (
            "Read the text in the {pic}.",
            "What does the text in the {pic} say?",
            "Can you read the text?",
            "What can you read in the {pic}?",
            "Tell me what it says.",
        ),
    ),
    "read word": (
        (
            "What word is this?",
            "What is the word?",
            "Read the word.",
            "Which word do you see?",
            "What word is written here?",
            "Which word is in the {pic}?",
            "What does the word say?",
            "Tell me the word.",
        ),
        ("What word do you see?", "Which word is this?", "Read the word in the {pic}.", "Which word is written here?"),
    ),
    "read number": (
        (
            "What number is this?",
            "What is the number?",
            "Read the number.",
            "Which number do you see?",
            "What number is written here?",
            "Which number is in the {pic}?",
            "What does the number say?",
            "Tell me the number.",
        ),
        (
            "What number do you see?",
            "Which number is this?",
            "Read the number in the {pic}.",
            "Which number is written here?",
        ),
    ),
    "read letters": (
        (
            "What letters are these?",
            "Read the letters.",
            "Which letters do you see?",
            "What letters are written here?",
            "Which letters are in the {pic}?",
            "Tell me the letters.",
            "What do the letters say?",
        ),
        ("What letters do you see?", "Which letters are these?", "Read the letters in the {pic}."),
    ),
    "read line": (
        (
            "What is the {which} word?",
            "Read the {which} word.",
            "What does the {which} word say?",
            "Which word is the {which} one?",
            "Tell me the {which} word.",
            "What is written on the {which} line?",
        ),
        ("What word is the {which} one?", "Read the {which} line.", "What does the {which} line say?"),
    ),
}
