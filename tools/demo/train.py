"""Train the demo model from scratch on one GPU.

One command reproduces the shipped weights' recipe (a run differs in its random scenes)::

    python tools/demo/train.py --minutes 18 --out build/demo/run

The schedule follows the clock: the learning rate warms up, holds, and falls to zero as the minutes run out.
``--total`` and ``--resume`` split one schedule over several calls. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import IGNORE, KINDS, LAYOUTS, MAX_QUESTIONS, Mix, Packer, Source, fill
from folder import CONFIG, write_folder
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from vlm import DecoderLayer, DemoModel, VisionLayer, attention_mask

from opsin.demo.scenes import COLOR_NAMES, num_labels

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "src" / "opsin" / "demo" / "model"


class Muon:
    """Momentum whose update is orthogonalised by Newton-Schulz steps, for the matrices inside the layers.

    Matrices of one shape are stacked, so that a step is a few batched products. The update's size matches AdamW's at
    the same learning rate. Source: Jordan et al., "Muon", 2024; its scale from Liu et al., arXiv:2502.16982.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {
            shape: torch.zeros((len(group), *shape), device=group[0].device) for shape, group in self.groups.items()
        }
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix from its gradient."""
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * math.sqrt(max(shape))
            values = [parameter.data for parameter in group]
            torch._foreach_mul_(values, 1 - rate * self.weight_decay)
            torch._foreach_add_(values, list(update.to(values[0].dtype).unbind()), alpha=-rate * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of stacked matrices (K, R, C) near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def split_parameters(model: DemoModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices for Muon and everything else for AdamW."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = ".layers." in name or name.startswith("multi_modal_projector")
        if parameter.ndim == 2 and inner:
            matrices.append(parameter)
        elif "post_layernorm" not in name:
            others.append(parameter)
    return matrices, others


def forward(model: DemoModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one batch.

    Returns:
        Scores at the graded places (G, V), their true tokens (G,), the flat indices of those places (G,), and the
        tower's features (M, P, D).
    """
    device = batch["tokens"].device
    with torch.autocast(device.type, torch.bfloat16):
        pixels = batch["pixels"].flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        features = model.see(pixels)
        tokens = batch["tokens"].long()
        mask = attention_mask(batch["segments"], torch.bfloat16)
        hidden = model.hidden(features, tokens, batch["positions"], mask)
        graded = batch["targets"].flatten().nonzero().squeeze(1)
        scores = model.logits(hidden.flatten(0, 1)[graded])
    # The token after each graded place is the one it should predict; no sequence ends in a graded place.
    return scores, tokens.flatten()[graded + 1], graded, features


def losses(model: DemoModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the answer loss, the patch loss and the share of answer tokens that are right."""
    scores, truth, graded, features = forward(model, batch)
    weights = batch["weights"].flatten()[graded].float()
    each = F.cross_entropy(scores.float(), truth, reduction="none")
    answer = (each * weights).sum() / weights.sum()
    right = (scores.argmax(-1) == truth).float().mean()
    with torch.autocast(truth.device.type, torch.bfloat16):
        seen = model.heads["norm"](features)
        what, color = model.heads["what"](seen), model.heads["color"](seen)
    patch = 0.0
    for guess, label in ((what, batch["what"]), (color, batch["color"])):
        label = label.flatten().long()
        # Most patches are background, and the tower learns that at once.
        weight = torch.where(label == 0, 0.15, 1.0) * (label != IGNORE)
        loss = F.cross_entropy(guess.flatten(0, 1).float(), label, reduction="none", ignore_index=IGNORE)
        patch = patch + (loss * weight).sum() / weight.sum().clamp(min=1)
    return answer, torch.as_tensor(patch), right


@torch.no_grad()
def exact_by_kind(model: DemoModel, batches: Iterator[dict[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Count by kind how many answers are right to the last token: what greedy decoding would say, exactly."""
    counts = {kind: [0, 0] for kind in KINDS}
    for batch in batches:
        scores, truth, graded, _ = forward(model, batch)
        wrong = (scores.argmax(-1) != truth).long()
        rows = graded // batch["tokens"].shape[1]
        slots = rows * MAX_QUESTIONS + batch["targets"].flatten()[graded].long() - 1
        size = batch["tokens"].shape[0] * MAX_QUESTIONS
        errors = torch.zeros(size, dtype=torch.long, device=wrong.device).scatter_add_(0, slots, wrong)
        for kind, error in zip(batch["kinds"].flatten().tolist(), errors.tolist(), strict=True):
            if kind >= 0:
                counts[KINDS[kind]][0] += error == 0
                counts[KINDS[kind]][1] += 1
    return {kind: (right, total) for kind, (right, total) in counts.items() if total}


def held_out_batches(folder: Path, chunks: int, device: torch.device) -> dict[str, list[dict[str, Tensor]]]:
    """Draw test chunks; a tenth of them again with blank pictures is left to ``opsin.demo.evaluate``."""
    packer, rng = Packer(folder), random.Random("held-out")
    result: dict[str, list[dict[str, Tensor]]] = {}
    for family, layout in LAYOUTS.items():
        result[family] = []
        for _ in range(chunks):
            arrays = layout.empty(layout.chunk)
            fill(arrays, family, rng, "test", packer, Mix(), None)
            result[family].append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return result


def rate_at(progress: float, step: int, hold: float) -> float:
    """Return the learning rate's factor: linear warm-up over 300 steps, a plateau, a linear fall to zero."""
    return min(1.0, (step + 1) / 300) * (1.0 if progress < hold else max(0.0, (1 - progress) / (1 - hold)))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as bfloat16 safetensors."""
    save_file(
        {name: value.detach().to(torch.bfloat16).contiguous().cpu() for name, value in weights.items()},
        str(path),
        metadata={"format": "pt"},
    )


def main() -> None:
    """Train until the minutes are over; write weights, a table by kind and a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=18.0, help="how long this call trains")
    parser.add_argument("--total", type=float, help="length of the whole schedule in minutes; default: --minutes")
    parser.add_argument("--elapsed", type=float, help="minutes of the schedule already done; default: as resumed")
    parser.add_argument("--out", type=Path, default=Path("build/demo/run"))
    parser.add_argument("--state", type=Path, help="folder of the full state; default: --out")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init", type=Path, help="start from these weights instead (momentum starts afresh)")
    parser.add_argument("--easy-vqa", type=Path, default=ROOT / "build" / "demo" / "easy_vqa_train.npz")
    parser.add_argument("--mix", type=Path, help="JSON overrides of data.Mix")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--singles", type=int, default=640, help="sequences with one picture in a batch")
    parser.add_argument("--pairs", type=int, default=64, help="sequences with two pictures in a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--hold", type=float, default=0.35, help="share of the schedule at the full learning rate")
    parser.add_argument("--ring", type=int, default=250_000, help="sequences with one picture kept on the device")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--least-speed", type=float, default=0.0, help="stop if below this many pictures/s after 120 s")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--eval-chunks", type=int, default=12)
    parser.add_argument("--seed", default="opsin")
    args = parser.parse_args()
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    total = 60 * (args.total or args.minutes)
    state_folder = args.state or args.out
    for path in (args.out, state_folder):
        path.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu":
        torch.set_num_threads(2)

    write_folder(MODEL)
    state_path = state_folder / "state.pt"
    state = (
        torch.load(state_path, map_location=device, weights_only=True) if args.resume and state_path.exists() else None
    )
    step = int(state["step"]) if state else 0
    before = 60 * args.elapsed if args.elapsed is not None else float(state["elapsed"]) if state else 0.0
    easy_path = args.easy_vqa if args.easy_vqa.exists() else None
    print(f"easy-vqa mixed in: {easy_path is not None}; resumed at step {step}, {before:.0f} s", flush=True)
    source = Source(
        MODEL,
        easy_path,
        Mix.read(args.mix),
        args.workers,
        {"single": args.ring, "pair": args.ring // 6},
        device,
        f"{args.seed}-{step}-{before:.0f}",
    )

    model = DemoModel(CONFIG, num_labels(), 1 + len(COLOR_NAMES)).to(device)
    if args.init:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(str(args.init)), strict=False)
    if state:
        model.load_state_dict(state["model"])
    matrices, others = split_parameters(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    live = dict(model.named_parameters())
    average = {name: value.detach().clone() for name, value in live.items()}
    if state:
        adam.load_state_dict(state["adam"])
        for shape, buffer in zip(muon.groups, state["muon"], strict=True):
            muon.buffers[shape].copy_(buffer)
        average = {name: value.clone() for name, value in state["average"].items()}
    print(f"{sum(v.numel() for v in model.checkpoint().values())} parameters ship", flush=True)
    if not args.no_compile:
        for module in model.modules():
            if isinstance(module, VisionLayer | DecoderLayer):
                module.compile(dynamic=False)

    held_out = held_out_batches(MODEL, args.eval_chunks, device)

    def evaluate(label: str) -> dict[str, tuple[int, int]]:
        """Print the held-out table of the averaged weights."""
        current = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(average[name])
        model.eval()
        table: dict[str, tuple[int, int]] = {}
        # Other batch sizes than training's: compiling for them would take longer than running them.
        with torch.compiler.set_stance("force_eager"):
            for family in LAYOUTS:
                for kind, (right, count) in exact_by_kind(model, iter(held_out[family])).items():
                    old = table.get(kind, (0, 0))
                    table[kind] = (old[0] + right, old[1] + count)
        model.train()
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(current[name])
        line = "  ".join(f"{kind} {100 * right / count:.1f}" for kind, (right, count) in table.items())
        print(f"[{label}] {line}", flush=True)
        return table

    generator = torch.Generator(device).manual_seed(step + 1)
    while any(
        ring.filled < count for ring, count in zip(source.rings.values(), (args.singles, args.pairs), strict=True)
    ):
        time.sleep(0.1)
    print(f"first data after {time.monotonic() - started:.0f} s", flush=True)
    first_step, mark, mark_step = step, time.monotonic(), step
    marked_written = 0
    next_evaluation = time.monotonic() + 150
    sums = torch.zeros(3, device=device)
    while step < first_step + args.max_steps:
        now = time.monotonic()
        if now > deadline - 12:
            break
        progress = (before + now - started) / total
        factor = rate_at(progress, step, args.hold)
        patch_weight = 0.6 if progress < 0.15 else 0.25 if progress < 0.6 else 0.08
        for family, count in (("single", args.singles), ("pair", args.pairs)):
            answer, patch, right = losses(model, source.rings[family].sample(count, generator))
            share = 0.86 if family == "single" else 0.14
            (share * (answer + patch_weight * patch)).backward()
            sums += share * torch.stack([answer.detach(), patch.detach(), right])
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = 0.6 * args.rate * factor
        adam.step()
        muon.step(args.rate * factor)
        model.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [value.detach() for value in live.values()], 1 - keep)
        if step in (1, 2, 5, 20) or step % 100 == 0:
            answer, patch, right = (sums / (step - mark_step)).tolist()
            sums.zero_()
            now = time.monotonic()
            speed = (step - mark_step) * (args.singles + 2 * args.pairs) / (now - mark)
            written = sum(ring.written * ring.layout.pictures for ring in source.rings.values())
            print(
                f"step {step} {before + now - started:.0f}s answers {answer:.4f} patches {patch:.4f} "
                f"tokens {100 * right:.2f}% rate {factor:.3f} {speed:.0f} pictures/s "
                f"(drawn {(written - marked_written) / (now - mark):.0f}/s)",
                flush=True,
            )
            mark, mark_step, marked_written = now, step, written
            if not math.isfinite(answer):
                raise SystemExit("the loss is not finite")
            if now - started > 120 and speed < args.least_speed:
                print("too slow, stopping", flush=True)
                break
        if time.monotonic() > next_evaluation:
            evaluate(f"step {step}")
            next_evaluation = time.monotonic() + 150
    elapsed = before + time.monotonic() - started
    shipped = model.checkpoint().keys()
    save_weights({name: average[name] for name in shipped}, args.out / "model.safetensors")
    save_weights({name: live[name] for name in shipped}, args.out / "raw.safetensors")
    torch.save(
        {
            "step": step,
            "elapsed": elapsed,
            "model": model.state_dict(),
            "adam": adam.state_dict(),
            "muon": list(muon.buffers.values()),
            "average": average,
        },
        state_path,
    )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    table = evaluate("end")
    (args.out / "table.json").write_text(json.dumps({"step": step, "seconds": elapsed, "exact": table}, indent=1))
    source.close()
    print(f"done: {step} steps, {elapsed:.0f} s of the schedule", flush=True)


if __name__ == "__main__":
    main()
