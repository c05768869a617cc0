"""Wordings: whether something is there."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "exist": (
        (
            "Is there {a}?",
            "Is there {a} in the {pic}?",
            "Do you see {a}?",
            "Does the {pic} contain {a}?",
            "Can you see {a}?",
            "Is {a} present?",
            "Does the {pic} show {a}?",
            "Can you find {a} in the {pic}?",
            "Is {a} shown?",
            "Tell me if there is {a}.",
            "Is {a} there?",
            "Do you see {a} anywhere?",
        ),
        (
            "Is {a} in the {pic}?",
            "Can you see {a} in the {pic}?",
            "Can you find {a}?",
            "Does the {pic} have {a}?",
            "Do you see {a} in the {pic}?",
        ),
    ),
    "exist any": (
        (
            "Are there any {s}?",
            "Are there any {s} in the {pic}?",
            "Do you see any {s}?",
            "Can you see any {s}?",
            "Does the {pic} contain {s}?",
            "Does the {pic} show any {s}?",
            "Are there {s} in the {pic}?",
        ),
        ("Can you see any {s} in the {pic}?", "Does the {pic} have any {s}?", "Are any {s} there?"),
    ),
    "not exist": (
        (
            "Is there no {n} in the {pic}?",
            "Is there no {n}?",
            "Is no {n} present?",
            "Is it true that there is no {n}?",
        ),
        ("Is it true that there is no {n} in the {pic}?", "Is no {n} there?"),
    ),
    "says": (
        (
            'Does it say "{w}"?',
            'Is the text "{w}"?',
            'Does the {pic} say "{w}"?',
            'Can you read "{w}"?',
            'Is "{w}" written there?',
        ),
        ('Is "{w}" written in the {pic}?', 'Can you read "{w}" in the {pic}?'),
    ),
}
