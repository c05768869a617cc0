"""Questions about scenes, and their true answers. Scenes are in :mod:`opsin.demo.scenes`.

One file per topic asks: ``naming``, ``counting``, ``placing``, ``comparing``, ``existence``, ``reading``,
``describing``; ``intents`` gathers them. ``pairs`` asks about two pictures, ``chat`` about none.

A question is built in three steps: ``choosing`` finds something to ask about, the topic's file works out the answer,
and ``phrasing`` words it from ``wordings``, where each topic has a file of the same name. ``nouns`` and ``places`` hold
the English that they share, ``question`` the type.
"""

from opsin.demo.questions.chat import ask_chat
from opsin.demo.questions.describing import caption_facts, caption_of, list_of, recall
from opsin.demo.questions.intents import INTENT_WEIGHTS, INTENTS, questions_about
from opsin.demo.questions.nouns import join, plural, with_article
from opsin.demo.questions.pairs import sample_pair
from opsin.demo.questions.question import KINDS, SPELLED, Question, plain
from opsin.demo.questions.wordings import PHRASES

__all__ = [
    "INTENTS",
    "INTENT_WEIGHTS",
    "KINDS",
    "PHRASES",
    "SPELLED",
    "Question",
    "ask_chat",
    "caption_facts",
    "caption_of",
    "join",
    "list_of",
    "plain",
    "plural",
    "questions_about",
    "recall",
    "sample_pair",
    "with_article",
]
