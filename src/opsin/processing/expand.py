"""Where a prompt's pictures stand, and the tokens and feature spans that take their places. Linear in the prompt."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from opsin.errors import RequestError
from opsin.models.rule import MediaRule, Placeholder, TokenRun
from opsin.processing.neutral import Rendered, Span
from opsin.processing.tokenizer import Tokenizer
from opsin.types import FeatureSpan, MediaItem, Modality

Placeholders = Mapping[Modality, Placeholder]


class Slotted(NamedTuple):
    """A tokenised prompt, cut at its placeholders: ``slots[i]`` stands between ``pieces[i]`` and ``pieces[i + 1]``."""

    pieces: list[list[int]]
    slots: list[Modality]


class Written(NamedTuple):
    """What stands for one item in a prompt: tokens, between texts that are tokenised with the prompt's own."""

    before: str
    runs: list[TokenRun]
    after: str

    def with_texts(self, tokenizer: Tokenizer) -> Written:
        """The same with the texts as tokens of their own, for a prompt that is ids already."""
        return Written("", [*_runs_of(self.before, tokenizer), *self.runs, *_runs_of(self.after, tokenizer)], "")


class Expanded(NamedTuple):
    """The ids of a whole prompt. ``ranges`` are the [start, end) positions of each item, in the order of its slots."""

    token_ids: list[int]
    spans: list[FeatureSpan]
    ranges: list[Span]


def write(media: Sequence[MediaItem], rule: MediaRule, tokenizer: Tokenizer) -> list[Written]:
    """What ``rule`` replaces the items' placeholders by. Per modality, they are in the order of the prompt."""
    numbers: Counter[Modality] = Counter()
    written: list[Written] = []
    for item in media:
        numbers[item.modality] += 1
        runs = list(rule.expand(item.modality, numbers[item.modality], item.layout))
        before = runs.pop(0) if runs and isinstance(runs[0], str) else ""
        after = runs.pop() if runs and isinstance(runs[-1], str) else ""
        assert isinstance(before, str)
        assert isinstance(after, str)
        tokens = [t for run in runs for t in (_runs_of(run, tokenizer) if isinstance(run, str) else (run,))]
        written.append(Written(before, tokens, after))
    return written


def with_texts(prompt: Rendered, placeholders: Placeholders, texts: Mapping[Modality, Sequence[Written]]) -> Rendered:
    """The prompt with the items' texts before and behind their placeholders."""
    texts = {m: items for m, items in texts.items() if any(item.before or item.after for item in items)}
    if not texts:
        return prompt
    found: list[tuple[int, int, Written]] = []
    for m, items in texts.items():
        signs = find_signs(prompt, [placeholders[m]])
        found += [(*span, item) for span, item in zip(signs, items, strict=False)]  # ``check_counts`` is still to come
    found.sort(key=lambda hit: hit[:2])
    return insert(prompt, [part for start, end, item in found for part in ((start, item.before), (end, item.after))])


def find_signs(prompt: Rendered, placeholders: Iterable[Placeholder]) -> list[Span]:
    """[start, end) of the placeholders, in order; those listed in ``prompt.plain`` are text."""
    plain = set(prompt.plain)
    hits = (match.span() for p in placeholders for match in re.finditer(p.pattern, prompt.text))
    return sorted(span for span in hits if span not in plain)


def insert(prompt: Rendered, added: Sequence[tuple[int, str]]) -> Rendered:
    """The prompt with texts written into it; ``added`` are (offset, text), in order."""
    pieces: list[str] = []
    done = shift = at = 0
    shifted: list[Span] = []
    for where, text in [*added, (len(prompt.text), "")]:
        while at < len(prompt.plain) and prompt.plain[at][1] <= where:
            shifted.append((prompt.plain[at][0] + shift, prompt.plain[at][1] + shift))
            at += 1
        pieces += (prompt.text[done:where], text)
        done, shift = where, shift + len(text)
    return Rendered("".join(pieces), shifted)


def tokenize(
    prompt: Rendered, placeholders: Placeholders, tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Slotted:
    """Tokenise a text prompt and find its placeholders; those listed in ``prompt.plain`` are text."""
    in_text: Placeholders = {m: p for m, p in placeholders.items() if p.token_id is None}
    if not in_text:
        ids = tokenizer.encode_rendered(prompt, add_special_tokens=add_special_tokens)
        return cut(ids, placeholders)
    plain = set(prompt.plain)
    found: list[tuple[int, int, Modality | None]] = []
    for m, placeholder in in_text.items():
        hits = [match for match in re.finditer(placeholder.pattern, prompt.text) if match.span() not in plain]
        _check_numbers(hits, placeholder, m)
        found.extend((*match.span(), m) for match in hits)
    pieces: list[list[int]] = [[]]
    slots: list[Modality] = []
    done, plain_at, begins = 0, 0, add_special_tokens
    found.sort(key=lambda hit: hit[:2])
    for start, end, modality in [*found, (len(prompt.text), len(prompt.text), None)]:
        here: list[Span] = []
        while plain_at < len(prompt.plain) and prompt.plain[plain_at][1] <= start:
            first, last = prompt.plain[plain_at]
            here.append((first - done, last - done))
            plain_at += 1
        piece = Rendered(prompt.text[done:start], here)
        ids = tokenizer.encode_rendered(piece, add_special_tokens=begins)
        more = cut(ids, placeholders)
        pieces[-1] += more.pieces[0]
        pieces += more.pieces[1:]
        slots += more.slots
        if modality is not None:
            slots.append(modality)
            pieces.append([])
            begins = in_text[modality].begins_text
        done = end
    return Slotted(pieces, slots)


def _check_numbers(hits: Sequence[re.Match[str]], placeholder: Placeholder, modality: Modality) -> None:
    """Refuse numbered placeholders that do not count the items in the order of the prompt."""
    for expected, hit in enumerate(hits, start=1):
        if hit.re.groups and int(hit[1]) != expected:
            raise RequestError(
                f"The prompt has {hit[0]!r} where {placeholder.text.format(index=expected)!r} was expected: give the "
                f"{modality}s in the order in which the prompt shows them, and number their placeholders from 1.",
                param="prompt",
            )


def cut(ids: Sequence[int], placeholders: Placeholders) -> Slotted:
    """Cut a prompt in ids at its placeholder ids."""
    modality_of: dict[int | None, Modality] = {
        p.token_id: modality for modality, p in placeholders.items() if p.token_id is not None
    }
    at = [i for i, token in enumerate(ids) if token in modality_of]
    edges = [-1, *at, len(ids)]
    pieces = [list(ids[start + 1 : end]) for start, end in itertools.pairwise(edges)]
    return Slotted(pieces, [modality_of[ids[i]] for i in at])


def check_counts(slots: Sequence[Modality], media: Sequence[MediaItem], placeholders: Placeholders) -> None:
    """Refuse a prompt whose placeholders and items differ in number."""
    wanted, given = Counter(slots), Counter(item.modality for item in media)
    for modality in placeholders:
        if wanted[modality] != given[modality]:
            sign = placeholders[modality].text.replace("{index}", "1")
            raise RequestError(
                f"The prompt has {wanted[modality]} {modality} placeholder(s) but {given[modality]} {modality}(s) were "
                f"given. Write one {sign!r} for each {modality}, where it belongs.",
                param=f"multi_modal_data.{modality}",
            )


def order_by_slots(slots: Sequence[Modality], media: Sequence[MediaItem]) -> list[int]:
    """Indices into ``media`` in the order in which the prompt shows the items."""
    queues = {m: iter([i for i, item in enumerate(media) if item.modality == m]) for m in set(slots)}
    return [next(queues[m]) for m in slots]


def expand(slotted: Slotted, written: Sequence[Written]) -> Expanded:
    """Put every item's tokens in its slot; ``written`` are in the order of the slots."""
    ids = list(slotted.pieces[0])
    spans: list[FeatureSpan] = []
    ranges: list[Span] = []
    for item, ((_, runs, _), piece) in enumerate(zip(written, slotted.pieces[1:], strict=True)):
        start = len(ids)
        spans += _spans(runs, item, start)
        for run in runs:
            ids += [run.token_id] * run.count
        ranges.append((start, len(ids)))
        ids += piece
    return Expanded(ids, spans, ranges)


def match_expanded(ids: list[int], written: Sequence[Written]) -> Expanded | None:
    """Read a prompt that is expanded already; None when its ids are not exactly what the items expand to.

    What stands before and behind an item's tokens is not looked at.
    """
    spans: list[FeatureSpan] = []
    ranges: list[Span] = []
    all_runs = [runs for _, runs, _ in written]
    feature_ids = {run.token_id for runs in all_runs for run in runs if run.is_feature}
    at = [i for i, token in enumerate(ids) if token in feature_ids]
    used = 0
    for item, runs in enumerate(all_runs):
        tokens = [token for run in runs for token in itertools.repeat(run.token_id, run.count)]
        first = next((i for i, token in enumerate(tokens) if token in feature_ids), None)
        if first is None or used >= len(at):
            return None
        start = at[used] - first
        end = start + len(tokens)
        if start < (ranges[-1][1] if ranges else 0) or ids[start:end] != tokens:
            return None
        spans += _spans(runs, item, start)
        ranges.append((start, end))
        used += sum(token in feature_ids for token in tokens)
    return Expanded(ids, spans, ranges) if used == len(at) else None


def truncate(prompt: Expanded, keep: int) -> tuple[Expanded, int]:
    """The last ``keep`` tokens, fewer where that would cut an item in two; and how many items were cut off in front."""
    cut_at = max(0, len(prompt.token_ids) - keep)
    dropped = 0
    for start, end in prompt.ranges:
        if start >= cut_at:
            break
        dropped += 1
        cut_at = max(cut_at, end)
    spans = [
        FeatureSpan(s.item - dropped, s.start - cut_at, s.length, s.feature_start)
        for s in prompt.spans
        if s.item >= dropped
    ]
    ranges = [(start - cut_at, end - cut_at) for start, end in prompt.ranges[dropped:]]
    return Expanded(prompt.token_ids[cut_at:], spans, ranges), dropped


def _runs_of(text: str, tokenizer: Tokenizer) -> list[TokenRun]:
    return [TokenRun(token) for token in tokenizer.encode(text, add_special_tokens=False)] if text else []


def _spans(runs: Sequence[TokenRun], item: int, start: int) -> list[FeatureSpan]:
    spans: list[FeatureSpan] = []
    feature = 0
    for run in runs:
        if run.is_feature:
            last = spans[-1] if spans else None
            if last is not None and last.start + last.length == start:  # two runs in a row are one span
                spans[-1] = FeatureSpan(item, last.start, last.length + run.count, last.feature_start)
            else:
                spans.append(FeatureSpan(item, start, run.count, feature))
            feature += run.count
        start += run.count
    return spans
