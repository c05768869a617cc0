"""Training data: processes that draw scenes and pack them, and a ring on the device that the trainer samples from.

A worker fills slots of shared memory with chunks of packed sequences. The ring keeps the latest hundreds of thousands
on the device and serves random batches, so the device never waits: where drawing is slower than training, a sequence
is seen more than once.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import queue
import random
import threading
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import torch
from folder import BOS, EOS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, PAD
from PIL import Image
from tokenizers import Tokenizer

from opsin.demo import questions as q
from opsin.demo import scenes

KINDS = (*q.KINDS, "easy-vqa")
MAX_QUESTIONS = 8
IGNORE = -1
"""Label of patches that the tower is not graded on."""

BLIND = 100
"""Added to the segment number of questions without a picture."""


@dataclass(frozen=True)
class Layout:
    """Sizes of one family of sequences: how many pictures, and how many tokens in all."""

    pictures: int
    tokens: int
    chunk: int

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape and type of each array of one sequence."""
        grid = scenes.GRID
        return {
            "pixels": ((self.pictures, IMAGE_SIZE, IMAGE_SIZE, 3), np.dtype(np.uint8)),
            "what": ((self.pictures, grid, grid), np.dtype(np.int16)),
            "color": ((self.pictures, grid, grid), np.dtype(np.int8)),
            "tokens": ((self.tokens,), np.dtype(np.int16)),
            "positions": ((self.tokens,), np.dtype(np.int16)),
            "segments": ((self.tokens,), np.dtype(np.uint8)),
            "targets": ((self.tokens,), np.dtype(np.uint8)),
            "weights": ((self.tokens,), np.dtype(np.float16)),
            "kinds": ((MAX_QUESTIONS,), np.dtype(np.int8)),
        }

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Return arrays for ``count`` sequences."""
        return {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self.fields().items()}

    def nbytes(self) -> int:
        """Return the bytes of one chunk."""
        return self.chunk * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.fields().values())

    def views(self, buffer: memoryview) -> dict[str, np.ndarray]:
        """Return one chunk's arrays over a buffer."""
        out, offset = {}, 0
        for name, (shape, dtype) in self.fields().items():
            count = self.chunk * int(np.prod(shape))
            out[name] = np.frombuffer(buffer, dtype, count, offset).reshape(self.chunk, *shape)
            offset += count * dtype.itemsize
        return out


LAYOUTS = {"single": Layout(1, 448, 128), "pair": Layout(2, 640, 64)}


class Packer:
    """Turns questions into tokens, packed behind one prefix of pictures."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = {token: self.tokenizer.token_to_id(token) for token in (BOS, EOS, PAD, IMAGE)}
        self.eos, self.pad, self.bos = ids[EOS], ids[PAD], ids[BOS]
        user, newline = self.encode("USER: "), self.encode("\n")
        pictures = [ids[IMAGE]] * IMAGE_TOKENS
        self.prefixes = {
            1: [self.bos, *user, *pictures],
            2: [self.bos, *user, *pictures, *newline, *pictures],
        }
        self.letters = {letter: self.encode(letter) for letter in scenes.CHARACTERS + " "}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without the token that starts a sequence."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_answer(self, answer: str) -> list[int]:
        """Return an answer's tokens; printed text is spelled letter by letter."""
        ids: list[int] = []
        for number, part in enumerate(answer.split(q.SPELLED)):
            if number % 2:
                for letter in part:
                    ids += self.letters[letter]
            elif part:
                ids += self.encode(part)
        return ids

    def pack(
        self, out: dict[str, np.ndarray], row: int, asked: list[q.Question], pictures: int, *, conversation: bool
    ) -> None:
        """Write one sequence into ``out`` at ``row``; questions that no longer fit are left out.

        In a conversation each turn sees the turns before it. Otherwise each question sees only the pictures.
        """
        prefix = self.prefixes[pictures]
        total = out["tokens"].shape[1]
        start = len(prefix)
        out["tokens"][row] = self.pad
        out["tokens"][row, :start] = prefix
        out["positions"][row] = 0
        out["positions"][row, :start] = np.arange(start)
        out["segments"][row] = 255
        out["segments"][row, :start] = 0
        out["targets"][row] = 0
        out["weights"][row] = 0
        out["kinds"][row] = -1
        cursor, position, number = start, start, 0
        for question in asked:
            if number == MAX_QUESTIONS:
                break
            blind = question.kind == "chat" and not conversation and len(question.question) % 2 == 0
            opening = "USER: " if blind or (conversation and number) else "\n"
            asked_ids = self.encode(f"{opening}{question.question} ASSISTANT:")
            answer_ids = [*self.encode_answer(question.answer), self.eos]
            length = len(asked_ids) + len(answer_ids)
            if cursor + length > total:
                continue
            span = slice(cursor, cursor + length)
            first = position if conversation else 1 if blind else start
            out["tokens"][row, span] = asked_ids + answer_ids
            out["positions"][row, span] = np.arange(first, first + length)
            out["segments"][row, span] = 0 if conversation else number + 1 + (BLIND if blind else 0)
            # The token before each answer token predicts it.
            graded = slice(cursor + len(asked_ids) - 1, cursor + length - 1)
            out["targets"][row, graded] = number + 1
            out["weights"][row, graded] = len(answer_ids) ** -0.5
            out["kinds"][row, number] = KINDS.index(question.kind)
            cursor += length
            position += length
            number += 1


def to_square(picture: Image.Image) -> np.ndarray:
    """Stretch a picture to what the model sees, as the image processor does."""
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


class EasyVQA:
    """The training split of easy-vqa, with its pictures redrawn at random sizes."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.pictures = data["pictures"]
            questions = json.loads(str(data["questions"]))
        self.questions: list[list[tuple[str, str]]] = [[] for _ in self.pictures]
        for question, answer, index in questions:
            self.questions[index].append((question, answer))

    def sample(self, rng: random.Random) -> tuple[np.ndarray, list[q.Question]]:
        """Return one picture as the model sees it, and some of its questions."""
        index = rng.randrange(len(self.pictures))
        pixels = self.pictures[index]
        if rng.random() < 0.5:
            shift = np.asarray([rng.gauss(0, 6) for _ in range(3)], np.float32)
            pixels = (pixels + shift).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
        if rng.random() < 0.3:
            side = rng.randint(48, 128)
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        chosen = rng.sample(self.questions[index], min(MAX_QUESTIONS, len(self.questions[index])))
        return to_square(picture), [q.Question("easy-vqa", question, answer) for question, answer in chosen]


@dataclass(frozen=True)
class Mix:
    """How often each family of training sequence is drawn."""

    pair_chunks: float = 0.16
    easy_vqa: float = 0.05
    conversations: float = 0.06
    chat: float = 0.08
    recipes: tuple[float, ...] = scenes.RECIPE_WEIGHTS
    intents: tuple[tuple[str, float], ...] = tuple(q.INTENT_WEIGHTS.items())

    @classmethod
    def read(cls, path: Path | None) -> Mix:
        """Read a mix from JSON; what it leaves out keeps its default."""
        if path is None:
            return cls()
        data = json.loads(path.read_text(encoding="utf-8"))
        if "recipes" in data:
            data["recipes"] = tuple(data["recipes"])
        if "intents" in data:
            data["intents"] = tuple((q.INTENT_WEIGHTS | data["intents"]).items())
        return cls(**data)


def fill(
    out: dict[str, np.ndarray],
    family: str,
    rng: random.Random,
    split: scenes.Split,
    packer: Packer,
    mix: Mix,
    easy: EasyVQA | None,
) -> None:
    """Draw one chunk of sequences into ``out``."""
    intents = dict(mix.intents)
    for row in range(len(out["tokens"])):
        if family == "pair":
            first, second, asked = q.sample_pair(rng, split)
            for number, scene in enumerate((first, second)):
                out["pixels"][row, number] = to_square(scenes.render(scene))
                out["what"][row, number], out["color"][row, number] = scenes.label_grid(scene)
            rng.shuffle(asked)
            packer.pack(out, row, asked, 2, conversation=split == "train" and rng.random() < mix.conversations)
            continue
        if easy is not None and rng.random() < mix.easy_vqa:
            out["pixels"][row, 0], asked = easy.sample(rng)
            out["what"][row] = out["color"][row] = IGNORE
            packer.pack(out, row, asked, 1, conversation=False)
            continue
        scene = scenes.sample_scene(rng, split, weights=mix.recipes)
        out["pixels"][row, 0] = to_square(scenes.render(scene))
        out["what"][row, 0], out["color"][row, 0] = scenes.label_grid(scene)
        asked = q.questions_about(scene, rng, split, MAX_QUESTIONS, intents)
        if rng.random() < mix.chat:
            asked.insert(0, q.ask_chat(rng, split))
        packer.pack(out, row, asked, 1, conversation=split == "train" and rng.random() < mix.conversations)


def _work(
    seed: str,
    folder: Path,
    easy_path: Path | None,
    mix: Mix,
    free: mp.Queue,
    ready: mp.Queue,
) -> None:
    """Fill slots for ever; a slot arrives as (family, name of its shared memory)."""
    rng = random.Random(seed)
    packer = Packer(folder)
    easy = EasyVQA(easy_path) if easy_path else None
    attached: dict[str, shared_memory.SharedMemory] = {}
    while True:
        slot = free.get()
        if slot is None:
            return
        if slot not in attached:
            attached[slot] = shared_memory.SharedMemory(slot)
        family = "pair" if rng.random() < mix.pair_chunks else "single"
        out = LAYOUTS[family].views(attached[slot].buf)
        fill(out, family, rng, "train", packer, mix, easy)
        ready.put((family, slot))


class Ring:
    """The latest drawn sequences of one family, on the device."""

    def __init__(self, layout: Layout, capacity: int, device: torch.device) -> None:
        self.layout, self.capacity = layout, capacity // layout.chunk * layout.chunk
        self.arrays = {
            name: torch.empty((self.capacity, *shape), dtype=_torch_type(dtype), device=device)
            for name, (shape, dtype) in layout.fields().items()
        }
        self.cursor = self.filled = self.written = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, chunk: dict[str, np.ndarray]) -> None:
        """Copy one chunk over the oldest, beside the device's other work."""
        count = self.layout.chunk
        with torch.cuda.stream(self.stream):
            for name, array in chunk.items():
                self.arrays[name][self.cursor : self.cursor + count].copy_(torch.from_numpy(array))
        if self.stream is not None:
            self.stream.synchronize()
        self.cursor = (self.cursor + count) % self.capacity
        self.filled = min(self.capacity, self.filled + count)
        self.written += count

    def sample(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return ``count`` random sequences."""
        device = self.arrays["tokens"].device
        index = torch.randint(self.filled, (count,), device=device, generator=generator)
        return {name: array[index] for name, array in self.arrays.items()}


def _torch_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.zeros(1, dtype)).dtype


class Source:
    """Worker processes and the rings they fill."""

    def __init__(
        self,
        folder: Path,
        easy_path: Path | None,
        mix: Mix,
        workers: int,
        capacity: dict[str, int],
        device: torch.device,
        seed: str,
    ) -> None:
        self.rings = {family: Ring(layout, capacity[family], device) for family, layout in LAYOUTS.items()}
        context = mp.get_context("spawn")
        self.free, self.ready = context.Queue(), context.Queue()
        size = max(layout.nbytes() for layout in LAYOUTS.values())
        self.memory = {
            m.name: m for m in (shared_memory.SharedMemory(create=True, size=size) for _ in range(2 * workers))
        }
        for name in self.memory:
            self.free.put(name)
        self.processes = [
            context.Process(
                target=_work,
                args=(f"{seed}-{number}", folder, easy_path, mix, self.free, self.ready),
                daemon=True,
            )
            for number in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.stopping = False
        self.thread = threading.Thread(target=self._collect, daemon=True)
        self.thread.start()

    def _collect(self) -> None:
        while not self.stopping:
            try:
                family, slot = self.ready.get(timeout=0.2)
            except queue.Empty:
                continue
            self.rings[family].write(LAYOUTS[family].views(self.memory[slot].buf))
            self.free.put(slot)

    def close(self) -> None:
        """Stop the workers and free the shared memory."""
        self.stopping = True
        self.thread.join()
        for process in self.processes:
            process.terminate()
        for memory in self.memory.values():
            memory.close()
            memory.unlink()
