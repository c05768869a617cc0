"""Measure the demo model on held-out scenes: ``python -m opsin.demo.evaluate``.

Every question is drawn from a seed, with wordings, fonts, words, colour-shape pairs, pictogram pairs and (for three
scenes in four that are not text) backgrounds that training never uses; the overlap is counted and printed. Answers are
compared whole; lists and captions also by the share of the scene's facts that they state. The same questions about
blank pictures show what guessing from the words alone would score.

``easy-vqa``, a public test set, is measured too where it is installed (``pip install easy-vqa``).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from opsin.demo import pack
from opsin.demo.questions import (
    INTENTS,
    KINDS,
    PHRASES,
    Question,
    ask_chat,
    plain,
    recall,
    sample_pair,
)
from opsin.demo.scenes import (
    HELD_OUT_BACKGROUNDS,
    TEXT_KINDS,
    TRAINING_BACKGROUNDS,
    Recipe,
    Scene,
    TextKind,
    is_held_out_combination,
    is_held_out_pair,
    render,
    sample_scene,
)

if TYPE_CHECKING:
    from opsin.inputs import PromptType

MAX_TOKENS = 128

_RECIPES: dict[str, tuple[Recipe, ...]] = {
    "name": ("name", "single"),
    "category": ("name", "pictograms"),
    "shape": ("shapes", "single"),
    "color": ("shapes", "mixed", "single", "text"),
    "background": ("shapes", "pictograms", "text", "blank"),
    "count": ("count", "count", "pictograms", "mixed", "text"),
    "position": ("shapes", "pictograms", "mixed"),
    "direction": ("shapes", "single", "count"),
    "relation": ("shapes", "pictograms", "mixed"),
    "comparison": ("shapes", "count", "pictograms", "mixed"),
    "exist": ("shapes", "count", "pictograms", "mixed", "text"),
    "absent": ("shapes", "pictograms", "mixed"),
    "list": ("shapes", "count", "pictograms", "mixed", "text"),
    "caption": ("shapes", "count", "pictograms", "mixed", "text"),
}
"""Scenes that each kind of question is asked about."""


_LISTED = frozenset({"list", "caption"})
"""Kinds whose answers hold several facts, scored one by one too."""

_READ_KINDS: dict[str, TextKind] = {f"read {kind}": kind for kind in TEXT_KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its pictures and its true answer."""

    group: str
    """The row of the table: a task kind, or a set of its own such as "pictograms"."""
    question: str
    answer: str
    pictures: tuple[Image.Image, ...]

    @property
    def prompt(self) -> str:
        """The question in the model's chat format."""
        return "USER: " + "<image>\n" * len(self.pictures) + self.question + " ASSISTANT:"


class Backend(Protocol):
    """Whatever answers examples, in order."""

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """Return one answer per example."""
        ...


class OpsinBackend:
    """opsin's own engine."""

    def __init__(self, model: str) -> None:
        from opsin import LLM

        self.llm = LLM(model=model, limit_mm_per_prompt={"image": 2})

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """Answer all examples in one continuous batch."""
        from opsin import SamplingParams

        prompts: list[PromptType] = [
            {"prompt": example.prompt, "multi_modal_data": {"image": list(example.pictures)}}
            if example.pictures
            else {"prompt": example.prompt}
            for example in examples
        ]
        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
        return [output.outputs[0].text for output in outputs]


class TransformersBackend:
    """Hugging Face transformers on the same folder, in float32."""

    def __init__(self, model: str, batch: int = 16) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = str(resources.files("opsin.demo") / "model") if model == "demo" else model
        self.torch, self.batch = torch, batch
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, examples: Sequence[Example]) -> list[str]:
        """Answer in batches of examples with equally many pictures and about equally long questions."""
        order = sorted(range(len(examples)), key=lambda k: (len(examples[k].pictures), len(examples[k].answer)))
        answers = [""] * len(examples)
        while order:
            pictures = len(examples[order[0]].pictures)
            chosen = [k for k in order[: self.batch] if len(examples[k].pictures) == pictures]
            order = order[len(chosen) :]
            images = [list(examples[k].pictures) for k in chosen] if pictures else None
            inputs = self.processor(
                text=[examples[k].prompt for k in chosen], images=images, return_tensors="pt", padding=True
            )
            with self.torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
            new = output[:, inputs["input_ids"].shape[1] :]
            for k, text in zip(chosen, self.processor.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[k] = text
        return answers


def _example(group: str, question: Question, scenes: Sequence[Scene]) -> Example:
    return Example(
        group=group,
        question=question.question,
        answer=plain(question.answer),
        pictures=tuple(render(scene) for scene in scenes),
    )


def examples_of(kind: str, count: int, seed: int) -> list[Example]:
    """Draw ``count`` held-out examples of one task kind."""
    rng = random.Random(f"{seed} {kind}")
    found: list[Example] = []
    while len(found) < count:
        if kind == "chat":
            question = ask_chat(rng, "test")
            scenes = [sample_scene(rng, "test")] if rng.random() < 0.5 else []
            found.append(_example(kind, question, scenes))
        elif kind.startswith("pair "):
            first, second, questions = sample_pair(rng, "test", kind)
            matching = [question for question in questions if question.kind == kind]
            if matching:
                found.append(_example(kind, rng.choice(matching), (first, second)))
        elif kind in _READ_KINDS:
            recipe: Recipe = "text" if rng.random() < 0.85 or kind == "read letters" else "mixed"
            scene = sample_scene(rng, "test", recipe, text_kind=_READ_KINDS[kind])
            question = INTENTS["read"](scene, rng, "test")
            if question is not None and question.kind == kind:
                found.append(_example(kind, question, [scene]))
        else:
            scene = sample_scene(rng, "test", rng.choice(_RECIPES[kind]))
            question = INTENTS[kind](scene, rng, "test")
            if question is not None:
                found.append(_example(kind, question, [scene]))
    return found


def pictogram_examples(seed: int, styles: tuple[str, ...] | None = None) -> list[Example]:
    """Ask for the name of every pictogram once, each alone on a held-out background.

    ``styles`` restricts the icon sets; things that none of them draws are left out.
    """
    rng = random.Random(f"{seed} pictograms")
    group = "pictograms" if styles is None else "pictograms, unseen style"
    found = []
    for thing in pack.pictograms().things:
        if styles is not None and not any(style in thing.tiles for style in styles):
            continue
        question = None
        while question is None:
            # A large thing may find no place in its picture; the next draw is smaller sooner or later.
            scene = sample_scene(rng, "test", "name", styles=styles, only=thing.name)
            question = INTENTS["name"](scene, rng, "test")
            if question is not None:
                found.append(_example(group, question, [scene]))
    return found


def easy_vqa_examples(count: int, seed: int) -> list[Example]:
    """Return ``count`` questions of easy-vqa's test split (0: all), or none where it is not installed."""
    spec = util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "data" / "test"
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    if count:
        questions = random.Random(f"{seed} easy-vqa").sample(questions, min(count, len(questions)))
    pictures: dict[int, Image.Image] = {}
    found = []
    for question, answer, index in questions:
        if index not in pictures:
            with Image.open(folder / "images" / f"{index}.png") as picture:
                pictures[index] = picture.convert("RGB")
        found.append(Example(group="easy-vqa", question=question, answer=answer, pictures=(pictures[index],)))
    return found


def blanked(examples: Sequence[Example], per_group: int) -> list[Example]:
    """Return the first questions of each group that has pictures again, about white pictures."""
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        if example.pictures and seen[example.group] < per_group:
            seen[example.group] += 1
            white = tuple(Image.new("RGB", picture.size, "white") for picture in example.pictures)
            found.append(replace(example, pictures=white))
    return found


def overlap_with_training(scenes: int = 3000, seed: int = 0) -> dict[str, int]:
    """Count what the test holds back and training has all the same; every number should be 0.

    Rules are compared whole; scenes are drawn as training draws them and searched for what they must not show.
    """

    def normal(text: str) -> str:
        return text.lower().rstrip("?.")

    training_words = {normal(text) for training, _ in PHRASES.values() for text in training}
    held_out_words = {normal(text) for _, held_out in PHRASES.values() for text in held_out}
    counts = {
        "wordings": len(training_words & held_out_words),
        "fonts": len(set(pack.fonts(held_out=False)) & set(pack.fonts(held_out=True))),
        "backgrounds": len(set(TRAINING_BACKGROUNDS) & set(HELD_OUT_BACKGROUNDS)),
        "words": len(set(pack.words(held_out=False)) & set(pack.words(held_out=True))),
        "colour-shape pairs": 0,
        "pictogram pairs": 0,
        "printed texts": 0,
        "icon sets": 0,
    }
    rng = random.Random(f"{seed} overlap")
    held_out_styles = set(pack.pictograms().held_out_styles)
    for _ in range(scenes):
        scene = sample_scene(rng, "train")
        shown = [thing for thing in scene.things if thing.kind == "pictogram"]
        for thing in scene.things:
            if thing.kind == "shape":
                counts["colour-shape pairs"] += is_held_out_combination(thing.name, thing.color or "")
            elif thing.kind == "text":
                counts["printed texts"] += pack.is_held_out_text(thing.name)
            else:
                counts["icon sets"] += thing.style in held_out_styles
                counts["pictogram pairs"] += any(is_held_out_pair(thing.index, other.index) for other in shown)
        counts["backgrounds"] += scene.background.family in HELD_OUT_BACKGROUNDS
    return counts


@dataclass(slots=True)
class Row:
    """Scores of one group of examples."""

    count: int = 0
    right: int = 0
    facts: float = 0.0


def score(example: Example, answer: str) -> tuple[bool, float]:
    """Return whether an answer is exactly right, and the share of the true answer's facts that it states."""
    exact = answer.strip() == example.answer
    if example.group in _LISTED:
        return exact, recall(example.answer, answer.strip())
    return exact, float(exact)


def tabulate(
    examples: Sequence[Example], answers: Sequence[str]
) -> tuple[dict[str, Row], dict[str, Counter[tuple[str, str]]]]:
    """Return scores and the confusions (true answer, given answer) of each group."""
    rows: dict[str, Row] = {}
    confusions: dict[str, Counter[tuple[str, str]]] = {}
    for example, answer in zip(examples, answers, strict=True):
        row = rows.setdefault(example.group, Row())
        exact, facts = score(example, answer)
        row.count += 1
        row.right += exact
        row.facts += facts
        if not exact:
            confusions.setdefault(example.group, Counter())[example.answer, answer.strip()] += 1
    return rows, confusions


def markdown(rows: dict[str, Row], confusions: dict[str, Counter[tuple[str, str]]], blank_rows: dict[str, Row]) -> str:
    """Format the results as Markdown."""
    lines = ["| kind | questions | exact | facts stated | blank picture |", "| --- | ---: | ---: | ---: | ---: |"]
    for group, row in rows.items():
        blank = f"{100 * blank_rows[group].right / blank_rows[group].count:.0f} %" if group in blank_rows else ""
        facts = f"{100 * row.facts / row.count:.1f} %" if group in _LISTED else ""
        lines.append(f"| {group} | {row.count} | {100 * row.right / row.count:.1f} % | {facts} | {blank} |")
    lines += ["", "Most frequent confusions (true answer → given answer):", ""]
    for group in rows:
        if group in confusions:
            shown = [f"{truth} → {given} ({n})" for (truth, given), n in confusions[group].most_common(4)]
            lines.append(f"- {group}: " + "; ".join(shown))
    return "\n".join(lines)


def collect(per_kind: int, seed: int, easy_vqa: int, only: Sequence[str]) -> list[Example]:
    """Draw every example of the evaluation, or of the groups named in ``only``."""
    special: dict[str, Callable[[], list[Example]]] = {
        "pictograms": lambda: pictogram_examples(seed),
        "pictograms, unseen style": lambda: pictogram_examples(seed, pack.pictograms().held_out_styles),
        "easy-vqa": lambda: easy_vqa_examples(easy_vqa, seed),
    }
    examples: list[Example] = []
    for group in (*KINDS, *special):
        if only and group not in only:
            continue
        examples += special[group]() if group in special else examples_of(group, per_kind, seed)
    return examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the evaluation and print its tables."""
    parser = argparse.ArgumentParser(
        prog="python -m opsin.demo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo", help="'demo' or a folder of the same architecture")
    parser.add_argument("--backend", choices=("opsin", "transformers", "both"), default="opsin")
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each task kind")
    parser.add_argument(
        "--easy-vqa", type=int, default=1000, help="questions of easy-vqa's test split; 0 asks all 9,673"
    )
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--blank", type=int, default=50, help="questions of each row asked about blank pictures too")
    parser.add_argument("--only", nargs="*", default=(), metavar="KIND", help="only these rows of the table")
    parser.add_argument("--json", type=Path, help="write every question, true answer and given answer to this file")
    args = parser.parse_args(arguments)

    print("Overlap with training:", ", ".join(f"{name} {n}" for name, n in overlap_with_training().items()))
    examples = collect(args.per_kind, args.seed, args.easy_vqa, args.only)
    print(f"{len(examples)} questions")
    started = time.monotonic()
    backend: Backend = TransformersBackend(args.model) if args.backend == "transformers" else OpsinBackend(args.model)
    answers = backend.answer(examples)
    blank_examples = blanked(examples, args.blank)
    blank_rows = tabulate(blank_examples, backend.answer(blank_examples))[0] if blank_examples else {}
    rows, confusions = tabulate(examples, answers)
    print(f"{time.monotonic() - started:.0f} s\n")
    print(markdown(rows, confusions, blank_rows))
    if args.backend == "both":
        others = TransformersBackend(args.model).answer(examples)
        same = sum(first == second for first, second in zip(answers, others, strict=True))
        print(f"\nThe same answer from transformers: {same} of {len(examples)}")
    if args.json:
        records = [
            {"group": example.group, "question": example.question, "answer": example.answer, "given": answer}
            for example, answer in zip(examples, answers, strict=True)
        ]
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
