"""The wordings of every question, as data: one file per topic, merged into ``PHRASES``.

Each intent has two sets of wordings: those that training uses, and those that only the test uses. Slots in braces are
filled by :func:`opsin.demo.questions.phrasing.phrase`; ``{pic}`` and ``{color}`` become one of their synonyms.
"""

from opsin.demo.questions.wordings import comparing, counting, describing, existence, naming, pairs, placing, reading

PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **naming.WORDINGS,
    **describing.WORDINGS,
    **counting.WORDINGS,
    **placing.WORDINGS,
    **comparing.WORDINGS,
    **existence.WORDINGS,
    **reading.WORDINGS,
    **pairs.WORDINGS,
}
"""Wordings for training and for the test, by intent."""
