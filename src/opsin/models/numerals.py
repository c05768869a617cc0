"""Numbers in English words, for prompts that spell them. No torch."""

from __future__ import annotations

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(count: int) -> str:
    """A number below a million, spelled as num2words does: "one thousand, two hundred and twenty-one"."""
    if count < 20:
        return _SMALL[count]
    if count < 100:
        return _TENS[count // 10] + (f"-{_SMALL[count % 10]}" if count % 10 else "")
    size, name = (100, "hundred") if count < 1000 else (1000, "thousand")
    rest = count % size
    joint = " and " if rest < 100 else ", "
    return f"{in_words(count // size)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")
