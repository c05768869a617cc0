"""Conversation without a picture's facts: greetings, thanks, and what no picture answers."""

from __future__ import annotations

import random

from opsin.demo.questions.phrasing import decorate
from opsin.demo.questions.question import Question
from opsin.demo.scenes import Split

_CHAT: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hi!", "Hello there.", "Hey!", "Good morning!", "Hi, how are you?", "Hello"),
        ("Hi there!", "Good evening!", "Hello, how are you?"),
        "Hello! Ask me about a picture.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What can you do?", "Tell me about you.", "Help"),
        ("What's your name?", "Tell me who you are.", "What can you do for me?"),
        "I am a small demo model. I can name things, read words and describe shapes in a picture.",
    ),
    (
        ("Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot."),
        ("Many thanks!", "Thank you a lot!"),
        "You are welcome.",
    ),
    (
        (
            "What is the capital of France?",
            "Who wrote this book?",
            "What is the weather like today?",
            "Tell me a joke.",
            "Write a poem.",
            "What is two plus two?",
            "Who is the president?",
            "What time is it?",
            "How old are you?",
            "Translate this to German.",
            "Write a function in Python.",
            "What is the meaning of life?",
            "How do I cook rice?",
            "Tell me a story about a dragon.",
            "What is the capital of Japan?",
            "How far is the moon?",
        ),
        ("What is the capital of Spain?", "Tell me a story.", "Write a poem about a cat.", "How do I cook an egg?"),
        "I can only answer questions about pictures.",
    ),
)
"""Wordings for training, wordings for the test, and the answer."""


def ask_chat(rng: random.Random, split: Split) -> Question:
    """Greet, or ask what no picture answers."""
    training, held_out, answer = rng.choice(_CHAT)
    text = rng.choice(training if split == "train" else held_out)
    return Question("chat", decorate(rng, text, brief=False) if split == "train" else text, answer)
