"""Wordings: which things there are more of, and which are bigger."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "more": (
        (
            "Are there more {a} than {b}?",
            "Do you see more {a} than {b}?",
            "Does the {pic} show more {a} than {b}?",
            "Is the number of {a} larger than the number of {b}?",
            "Are there more {a} than {b} in the {pic}?",
            "Are more {a} than {b} there?",
        ),
        (
            "Can you see more {a} than {b}?",
            "Does the {pic} have more {a} than {b}?",
            "Tell me if there are more {a} than {b}.",
        ),
    ),
    "fewer": (
        (
            "Are there fewer {a} than {b}?",
            "Do you see fewer {a} than {b}?",
            "Does the {pic} show fewer {a} than {b}?",
            "Are there fewer {a} than {b} in the {pic}?",
            "Are there less {a} than {b}?",
        ),
        ("Can you see fewer {a} than {b}?", "Does the {pic} have fewer {a} than {b}?"),
    ),
    "which more": (
        (
            "Are there more {a} or more {b}?",
            "What are there more of, {a} or {b}?",
            "Which are there more of, {a} or {b}?",
            "Do you see more {a} or more {b}?",
        ),
        ("What do you see more of, {a} or {b}?", "Which do you see more of, {a} or {b}?"),
    ),
    "bigger": (
        (
            "Is {a} bigger than {b}?",
            "Is {a} larger than {b}?",
            "Does {a} look bigger than {b}?",
            "In the {pic}, is {a} bigger than {b}?",
            "Is it true that {a} is larger than {b}?",
            "Tell me if {a} is bigger than {b}.",
        ),
        (
            "Is {a} bigger than {b} in the {pic}?",
            "Does {a} look larger than {b}?",
            "Is it true that {a} is bigger than {b}?",
        ),
    ),
    "smaller": (
        (
            "Is {a} smaller than {b}?",
            "Does {a} look smaller than {b}?",
            "In the {pic}, is {a} smaller than {b}?",
            "Is it true that {a} is smaller than {b}?",
        ),
        ("Is {a} smaller than {b} in the {pic}?", "Tell me if {a} is smaller than {b}."),
    ),
    "which bigger": (
        (
            "Which is bigger, {a} or {b}?",
            "Which one is larger, {a} or {b}?",
            "What is bigger: {a} or {b}?",
            "Which is larger, {a} or {b}?",
            "Is {a} or {b} bigger?",
        ),
        (
            "Which one is bigger, {a} or {b}?",
            "Tell me which is larger, {a} or {b}.",
            "Which thing is bigger, {a} or {b}?",
        ),
    ),
    "which smaller": (
        (
            "Which is smaller, {a} or {b}?",
            "Which one is smaller, {a} or {b}?",
            "What is smaller: {a} or {b}?",
            "Is {a} or {b} smaller?",
        ),
        ("Which thing is smaller, {a} or {b}?", "Tell me which is smaller, {a} or {b}."),
    ),
    "biggest": (
        (
            "What is the biggest thing?",
            "Which thing is the largest?",
            "What is the largest thing in the {pic}?",
            "Which is the biggest?",
            "Name the biggest thing.",
            "What is biggest in the {pic}?",
            "Which is the largest thing?",
        ),
        (
            "What is the biggest thing in the {pic}?",
            "Which thing is the biggest?",
            "Name the largest thing in the {pic}.",
        ),
    ),
    "smallest": (
        (
            "What is the smallest thing?",
            "Which thing is the smallest?",
            "Which is the smallest?",
            "Name the smallest thing.",
            "What is smallest in the {pic}?",
        ),
        ("What is the smallest thing in the {pic}?", "Which is the smallest thing?"),
    ),
}
