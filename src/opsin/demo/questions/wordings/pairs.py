"""Wordings: two pictures at once."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pair more": (
        (
            "Which {pic} has more {s}?",
            "Which {pic} shows more {s}?",
            "In which {pic} are there more {s}?",
            "Which of the two {pic}s has more {s}?",
            "Where are more {s}, in the first or in the second {pic}?",
            "Does the first or the second {pic} have more {s}?",
            "Which {pic} contains more {s}?",
        ),
        (
            "Which of the two {pic}s shows more {s}?",
            "In which {pic} do you see more {s}?",
            "Which one has more {s}, the first or the second {pic}?",
        ),
    ),
    "pair which": (
        (
            "Which {pic} has {a}?",
            "Which {pic} shows {a}?",
            "In which {pic} is {a}?",
            "Which of the two {pic}s has {a}?",
            "In which {pic} do you see {a}?",
            "Which {pic} contains {a}?",
            "Where is {a}, in the first or in the second {pic}?",
        ),
        (
            "Which of the two {pic}s shows {a}?",
            "In which {pic} can you see {a}?",
            "Which of these {pic}s contains {a}?",
        ),
    ),
    "pair both": (
        (
            "Do both {pic}s show {a}?",
            "Is there {a} in both {pic}s?",
            "Do both {pic}s contain {a}?",
            "Do you see {a} in both {pic}s?",
        ),
        ("Do both {pic}s have {a}?", "Can you see {a} in both {pic}s?"),
    ),
    "pair same": (
        (
            "Are the two {pic}s the same?",
            "Are they the same?",
            "Do both {pic}s show the same?",
            "Is the first {pic} the same as the second?",
            "Are these {pic}s the same?",
            "Do the {pic}s show the same things?",
            "Do they show the same?",
        ),
        ("Are these two {pic}s the same?", "Do both {pic}s show the same things?", "Are both {pic}s the same?"),
    ),
    "pair different": (
        (
            "Are the two {pic}s different?",
            "Are they different?",
            "Is the first {pic} different from the second?",
            "Is there a difference between the {pic}s?",
        ),
        ("Are these {pic}s different?", "Is there a difference between the two {pic}s?"),
    ),
}
