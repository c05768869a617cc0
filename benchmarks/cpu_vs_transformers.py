"""opsin against transformers.generate on one CPU: the same random LLaVA checkpoint, the same requests, one process.

    python benchmarks/cpu_vs_transformers.py [--size toy] [--json FILE]

Three scenes, each timed from pictures and text to token ids, pictures decoded beforehand:

* one stream: a single request, against ``generate``;
* 16 requests, continuously batched by opsin, against ``generate`` one by one;
* the same 16 requests, against ``generate`` on one padded batch.

Every repeat uses pictures that neither side has seen, so no cache helps, and runs all sides one after the other; a
ratio is the median over repeats. Greedy ids must agree. Where they part, both continuations must have been tied in
transformers' own logits within a tolerance (equal-looking random weights do tie), otherwise the run fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from opsin import LLM, SamplingParams
from opsin.cli import environment
from opsin.cli.synthetic import photo

TIE_TOLERANCE = 1e-3  # of a logit; float32 sums in another order differ by about 1e-5
QUESTIONS = (
    "What is in this picture?",
    "Describe the picture in detail, from left to right and from top to bottom.",
    "How many objects are there?",
    "Which colours do you see, and which of them is the most common one?",
)
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # vision, text
    "toy": (
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "0.3b": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    ),
    "0.5b": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 18, "num_attention_heads": 20},
    ),
}  # fmt: skip


class Request(NamedTuple):
    prompt: str
    image: Image.Image


Side = Callable[[Sequence[Request]], list[list[int]]]
"""Answers requests with generated token ids."""


def build_checkpoint(folder: Path, size: str) -> None:
    """Save a random LLaVA with a small tokenizer; weights are drawn so that logits spread and pictures matter."""
    vision, text = SIZES[size]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        QUESTIONS * 2,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )

    def token_id(token: str) -> int:
        found = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    edge, patch = 224, 16
    vision_config = CLIPVisionConfig(image_size=edge, patch_size=patch, **vision)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=LlamaConfig(
            **text,
            num_key_value_heads=text["num_attention_heads"] // 2,
            vocab_size=32_000 if size != "toy" else 512,
            max_position_embeddings=2048,
            bos_token_id=token_id("<s>"),
            eos_token_id=token_id("</s>"),
            pad_token_id=token_id("<pad>"),
        ),
        image_token_index=token_id("<image>"),
        image_seq_length=(edge // patch) ** 2,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                continue
            std = 1.3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)


def make_requests(repeat: int, count: int) -> list[Request]:
    """``count`` requests with pictures that no other repeat has."""
    requests: list[Request] = []
    for index in range(count):
        with Image.open(io.BytesIO(photo(640, 480, seed=(repeat, index)))) as image:
            image.load()
            question = QUESTIONS[index % len(QUESTIONS)]
            requests.append(Request(f"USER: <image>\n{question} ASSISTANT:", image.copy()))
    return requests


class Transformers:
    """``generate`` on the checkpoint, greedy, a fixed number of tokens."""

    def __init__(self, folder: Path, dtype: torch.dtype, num_tokens: int) -> None:
        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self._num_tokens = num_tokens

    @torch.inference_mode()
    def batch(self, requests: Sequence[Request]) -> list[list[int]]:
        inputs = self._inputs(requests)
        limits = {"max_new_tokens": self._num_tokens, "min_new_tokens": self._num_tokens}
        ids = self._model.generate(**inputs, **limits, do_sample=False, eos_token_id=None)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def one_by_one(self, requests: Sequence[Request]) -> list[list[int]]:
        return [ids for request in requests for ids in self.batch([request])]

    @torch.inference_mode()
    def logits_after(self, request: Request, continuation: Sequence[int]) -> torch.Tensor:
        """The next token's logits, (vocabulary,), after the prompt and these tokens."""
        inputs = self._inputs([request])
        more = torch.tensor([list(continuation)], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self._model(**inputs).logits[0, -1].float()

    def _inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        inputs = dict(
            self._processor(
                images=[request.image for request in requests],
                text=[request.prompt for request in requests],
                return_tensors="pt",
                padding=True,
            )
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return inputs


def opsin_side(llm: LLM, num_tokens: int) -> Side:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)

    def answer(requests: Sequence[Request]) -> list[list[int]]:
        prompts: list[Any] = [{"prompt": r.prompt, "multi_modal_data": {"image": r.image}} for r in requests]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

    return answer


def timed(side: Side, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    answers = side(requests)
    return time.perf_counter() - started, answers


def disagreements(
    ours: list[list[int]], theirs: list[list[int]], requests: Sequence[Request], oracle: Transformers
) -> tuple[int, list[str]]:
    """Compare answers; returns how many parted at a tie, and what is wrong with the others."""
    ties, wrong = 0, []
    for index, (our_ids, their_ids) in enumerate(zip(ours, theirs, strict=True)):
        if our_ids == their_ids:
            continue
        at = next((i for i, pair in enumerate(zip(our_ids, their_ids, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            wrong.append(f"request {index}: {len(our_ids)} tokens, transformers {len(their_ids)}")
            continue
        logits = oracle.logits_after(requests[index], their_ids[:at])
        gap = float(logits.max() - min(logits[our_ids[at]], logits[their_ids[at]]))
        if gap <= TIE_TOLERANCE:
            ties += 1
        else:
            wrong.append(f"request {index}, token {at}: {our_ids[at]}, transformers {their_ids[at]}, {gap:.2g} apart")
    return ties, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="0.3b", help="parameters (default: 0.3b)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=16, help="requests at once (default: 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every scene (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads, both sides")
    parser.add_argument("--json", metavar="FILE", help="also write the report here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_checkpoint(folder, args.size)
        oracle = Transformers(folder, getattr(torch, args.dtype), args.tokens)
        with LLM(
            model=str(folder), dtype=args.dtype, max_num_seqs=args.requests, num_threads=args.threads, seed=0
        ) as llm:
            ours = opsin_side(llm, args.tokens)
            for side in (ours, oracle.batch):  # warm both up, on pictures of their own
                side(make_requests(args.repeats, 2))
            runs, ties, wrong = run_scenes(args, ours, oracle)

    report = {
        "command": shlex.join(["python", *sys.argv]),
        "size": args.size,
        "dtype": args.dtype,
        "requests": args.requests,
        "tokens": args.tokens,
        "seconds": runs,
        "ratios": {
            "one stream / generate": ratio(runs, "generate, one stream", "opsin, one stream"),
            "batch / generate one by one": ratio(runs, "generate, one by one", "opsin, batch"),
            "batch / generate static batch": ratio(runs, "generate, static batch", "opsin, batch"),
        },
        "ties": ties,
        "disagreements": wrong,
        "environment": environment.collect(),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, args)
    if wrong and args.dtype == "float32":
        print("FAILED: greedy ids differ from transformers':\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 1
    return 0


def run_scenes(
    args: argparse.Namespace, ours: Side, oracle: Transformers
) -> tuple[dict[str, list[float]], int, list[str]]:
    """Seconds per scene and repeat, ties, and disagreements."""
    runs: dict[str, list[float]] = {}
    ties, wrong = 0, []
    for repeat in range(args.repeats):
        requests = make_requests(repeat, args.requests + 1)
        single, many = requests[:1], requests[1:]
        answers: dict[str, list[list[int]]] = {}
        for name, side, asked in (
            ("opsin, one stream", ours, single),
            ("generate, one stream", oracle.one_by_one, single),
            ("opsin, batch", ours, many),
            ("generate, one by one", oracle.one_by_one, many),
            ("generate, static batch", oracle.batch, many),
        ):
            seconds, answers[name] = timed(side, asked)
            runs.setdefault(name, []).append(round(seconds, 4))
        for mine, reference, asked in (
            ("opsin, one stream", "generate, one stream", single),
            ("opsin, batch", "generate, one by one", many),
        ):
            new_ties, new_wrong = disagreements(answers[mine], answers[reference], asked, oracle)
            ties += new_ties
            wrong += [f"repeat {repeat}, {mine}: {line}" for line in new_wrong]
    return runs, ties, wrong


def ratio(runs: dict[str, list[float]], theirs: str, ours: str) -> float:
    """How many times faster we were: the median over repeats."""
    return round(statistics.median(t / o for t, o in zip(runs[theirs], runs[ours], strict=True)), 3)


def print_report(report: dict[str, Any], args: argparse.Namespace) -> None:
    facts = report["environment"]
    print(f"{report['command']}\ncommit {facts['commit']}, {facts['cpu']}, {args.threads} threads, {args.dtype}")
    print(f"torch {facts['packages']['torch']}, transformers {facts['packages']['transformers']}\n")
    for name, seconds in report["seconds"].items():
        count = 1 if "one stream" in name else args.requests
        middle = statistics.median(seconds)
        print(f"{name:<24} {middle:8.2f} s {count * args.tokens / middle:9.1f} tokens/s {count / middle:8.2f} images/s")
    print()
    for name, value in report["ratios"].items():
        print(f"{name:<32} {value:6.2f} x")
    agree = "agree" if not report["disagreements"] else "DIFFER"
    print(f"greedy ids {agree} with transformers ({report['ties']} answers parted at a tie of its logits)")


if __name__ == "__main__":
    sys.exit(main())
