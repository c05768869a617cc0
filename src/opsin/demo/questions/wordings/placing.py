"""Wordings: where things are, which way they point, and how they lie to each other."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "position": (
        (
            "Where is {t}?",
            "Where in the {pic} is {t}?",
            "In which part of the {pic} is {t}?",
            "What is the position of {t}?",
            "Where can I find {t}?",
            "Where do you see {t}?",
            "Which part of the {pic} has {t}?",
            "Where is {t} located?",
            "In what place is {t}?",
            "Tell me where {t} is.",
            "Where can you see {t} in the {pic}?",
        ),
        (
            "Where is {t} in the {pic}?",
            "Where is {t} located in the {pic}?",
            "In which place is {t}?",
            "Can you tell me where {t} is?",
        ),
    ),
    "what is at": (
        (
            "What is {place}?",
            "What is {place} of the {pic}?",
            "What do you see {place}?",
            "Which thing is {place}?",
            "What can you see {place}?",
            "Name the thing {place}.",
            "Tell me what is {place}.",
            "What's {place}?",
        ),
        ("What thing is {place}?", "What can you see {place} of the {pic}?", "What is there {place}?"),
    ),
    "direction": (
        (
            "Which way does {t} point?",
            "Which way is {t} pointing?",
            "In which direction does {t} point?",
            "What is the direction of {t}?",
            "Where does {t} point?",
            "What direction is {t} pointing in?",
            "Tell me which way {t} points.",
            "Where is {t} pointing?",
        ),
        (
            "What direction does {t} point?",
            "In which direction is {t} pointing?",
            "Tell me the direction of {t}.",
        ),
    ),
    "relation": (
        (
            "Is {a} {rel} {b}?",
            "Is {a} located {rel} {b}?",
            "Does {a} lie {rel} {b}?",
            "Can you see {a} {rel} {b}?",
            "Is {a} somewhere {rel} {b}?",
            "In the {pic}, is {a} {rel} {b}?",
            "Is it true that {a} is {rel} {b}?",
            "Tell me if {a} is {rel} {b}.",
        ),
        (
            "Is {a} {rel} {b} in the {pic}?",
            "Can you tell me if {a} is {rel} {b}?",
            "Is it true that {a} lies {rel} {b}?",
        ),
    ),
    "what relation": (
        (
            "What is {rel} {b}?",
            "Which thing is {rel} {b}?",
            "What do you see {rel} {b}?",
            "What can you see {rel} {b}?",
            "Name the thing {rel} {b}.",
            "Tell me what is {rel} {b}.",
            "What's {rel} {b}?",
        ),
        ("What thing is {rel} {b}?", "What is there {rel} {b}?", "What is {rel} {b} in the {pic}?"),
    ),
    "which side": (
        (
            "Which is {further}, {a} or {b}?",
            "Which one is {further}, {a} or {b}?",
            "What is {further}: {a} or {b}?",
            "Is {a} or {b} {further}?",
        ),
        ("Which thing is {further}, {a} or {b}?", "Tell me which is {further}, {a} or {b}."),
    ),
}
