"""The page that opsin was begun from: each of its code blocks runs, with a tiny checkpoint under the hub's name.

What stands in for the world: ``PIL.Image.open(...)`` and ``torch.load(...)`` give pictures and features, wikimedia's
pictures come as ``data:`` URLs, and localhost:8000 is a server on a free port.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import LLM, AsyncLLM
from opsin.cli.flags import engine_settings, parse
from opsin.cli.main import build_parser
from opsin.cli.serve import server_config, serving_settings
from opsin.media.ops import make_tiles
from opsin.server.app import create_app
from tests.engine.conftest import picture
from tests.factories.named import write_named
from tests.server.conftest import data_url, serving

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = Path(__file__).with_name("blocks")
HUB = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "microsoft/Phi-3.5-vision-instruct": "phi3_v",
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
    "openbmb/MiniCPM-V-2_6": "minicpmv",
    "TIGER-Lab/VLM2Vec-Full": "phi3_v",
    "MrLight/dse-qwen2-2b-mrl-v1": "qwen2_vl",
}
WIKIMEDIA = "https://upload.wikimedia.org/wikipedia/commons/"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint for a name on the hub, with room for the contexts that the page asks for."""
    base = tmp_path_factory.mktemp("hub")

    def get(name: str) -> Path:
        folder = base / HUB[name]
        if not folder.is_dir():
            write_named(folder, HUB[name])
            config = json.loads((folder / "config.json").read_text())
            for values in (config, config.get("text_config", {})):
                if "max_position_embeddings" in values:
                    values["max_position_embeddings"] = 8192
            (folder / "config.json").write_text(json.dumps(config))
            generation = json.loads((folder / "generation_config.json").read_text())
            (folder / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0}))  # to compare
        return folder

    return get


class Page:
    """Runs blocks in one namespace, as a reader would in one session."""

    def __init__(self, folder_of: Callable[[str], Path]) -> None:
        self._folder_of = folder_of
        self.engines: list[LLM] = []
        self.loaded: list[Any] = []  # what torch.load gives, in turn
        self.names: dict[str, Any] = {
            "LLM": self._llm,
            "PIL": SimpleNamespace(Image=SimpleNamespace(open=lambda _: picture(1))),
            "torch": SimpleNamespace(load=lambda _: self.loaded.pop(0)),
            "encode_image": encode_image,
        }

    def _llm(self, model: str, **settings: Any) -> LLM:
        self.engines.append(LLM(str(self._folder_of(model)), media_workers=0, seed=0, **settings))
        return self.engines[-1]

    def run(self, block: str, **replaced: str) -> None:
        """Run a block; ``replaced`` names strings of it that the world stands in for."""
        code = (BLOCKS / f"{block}.txt").read_text(encoding="utf-8")
        for old, new in replaced.items():
            assert old in code
            code = code.replace(old, new)
        exec(compile(code, block, "exec"), self.names)

    @property
    def texts(self) -> list[str]:
        """What the last block's loop printed."""
        return [output.outputs[0].text for output in self.names["outputs"]]


@pytest.fixture
def page(folder_of: Callable[[str], Path]) -> Iterator[Page]:
    page = Page(folder_of)
    yield page
    for engine in page.engines:
        engine.shutdown()


def encode_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def features_of(llm: LLM, image: Image.Image, sign: str) -> Any:
    """What the engine's own tower makes of a picture, and its layout."""
    front: Any = llm._front
    prompt = front.read_prompt({"prompt": sign, "multi_modal_data": {"image": image}})
    (item,) = front.inputs.process("probe", prompt, llm.get_default_sampling_params()).request.media
    plan = item.layout.plan
    pixels = np.empty(plan.num_bytes, np.uint8)
    make_tiles(image, plan, pixels)
    tiles: list[torch.Tensor] = []
    for height, width in plan.tile_sizes:
        tiles.append(torch.from_numpy(pixels[: height * width * 3].reshape(height, width, 3)))
        pixels = pixels[height * width * 3 :]
    with torch.inference_mode():
        return front.engine.core.executor._runner.model.encode([tiles], [item.layout]), item.layout


# --------------------------------------------------------------------------------------------- offline


def test_single_image_features_as_input_and_batch(page: Page, capsys: pytest.CaptureFixture[str]):
    page.run("llava_engine")
    page.run("single_image")
    by_picture = page.texts
    features, _ = features_of(page.engines[0], picture(1), "<image>")
    page.loaded.append(features[None])
    page.run("image_embeds")
    assert page.texts == by_picture
    page.run("batch")
    assert page.texts[0] == by_picture[0]
    assert len(page.texts) == 2
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in [*by_picture * 3, page.texts[1]])


def test_features_of_qwen2_vl_come_with_their_grid(page: Page):
    page.names["llm"] = llm = page._llm("Qwen/Qwen2-VL-2B-Instruct")
    sign = "<|vision_start|><|image_pad|><|vision_end|>"
    page.names["prompt"] = f"<|im_start|>user\n{sign}What is it?<|im_end|>\n<|im_start|>assistant\n"
    features, layout = features_of(llm, picture(1), sign)
    page.loaded += [features[None], torch.tensor([layout.numbers])]
    page.run("image_embeds_qwen2_vl")
    page.run("image_embeds_generate")
    by_features = page.texts
    page.names["mm_data"] = {"image": picture(1)}
    page.run("image_embeds_generate")
    assert by_features == page.texts


def test_features_of_minicpmv_come_with_the_size_of_their_picture(page: Page):
    page.names["llm"] = llm = page._llm("openbmb/MiniCPM-V-2_6")
    sign = "(<image>./</image>)"
    page.names |= {"prompt": f"<|im_start|>user\n{sign}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", "mm_data": {}}
    features, _ = features_of(llm, picture(1), sign)
    page.names |= {"image": picture(1), "image_embeds": features[None]}
    page.run("image_embeds_minicpmv")
    page.run("image_embeds_generate")
    by_features = page.texts
    page.names["mm_data"] = {"image": picture(1)}
    page.run("image_embeds_generate")
    assert by_features == page.texts


def test_multi_image(page: Page):
    page.run("phi3_engine")
    page.run("multi_image")
    (output,) = page.names["outputs"]
    assert output.num_media_tokens > 0
    assert len(output.outputs[0].token_ids) > 0


def test_frames_of_a_video_as_pictures(page: Page):
    page.names["frames"] = [picture(seed) for seed in range(4)]
    page.run("video_frames", **{"video_frames = ...": "video_frames = frames"})
    (output,) = page.names["outputs"]
    assert output.prompt.count("<|image_pad|>") == 4


# ---------------------------------------------------------------------------------------------- online


@contextmanager
def served(block: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A shell block's server, from the repository's root, under the hub's name; its address."""
    monkeypatch.chdir(ROOT)
    words = shlex.split((BLOCKS / f"{block}.sh").read_text().replace("\\\n", " "))
    assert words.pop(0) == "opsin"
    args = parse(build_parser(), words)
    settings = serving_settings(engine_settings(args), {})
    name = settings.pop("model")
    settings["media_workers"] = 1
    with (
        AsyncLLM(str(folder_of(name)), **settings) as engine,
        serving(create_app(engine, server_config(args), model=name)) as address,
    ):
        assert engine.max_model_len == settings["max_model_len"]
        yield address


def stand_ins(block: str, address: str) -> dict[str, str]:
    """The block's address and pictures, and what stands in for them."""
    code = (BLOCKS / f"{block}.txt").read_text(encoding="utf-8")
    urls = [word for word in code.split('"') if word.startswith(WIKIMEDIA)]
    return {"http://localhost:8000": address} | {url: data_url(i) for i, url in enumerate(urls)}


def test_chat_through_the_openai_client(
    page: Page, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with served("serve_phi3", folder_of, monkeypatch) as address:
        page.run("chat_client", **stand_ins("chat_client", address))
        page.names["client"].close()
    assert capsys.readouterr().out.count("Chat completion output:") == 2


def test_vectors_of_messages_through_a_plain_post(
    page: Page, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with served("serve_vlm2vec", folder_of, monkeypatch) as address:
        page.run("embedding_client", **stand_ins("embedding_client", address))
    vector = page.names["response_json"]["data"][0]["embedding"]
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    assert capsys.readouterr().out == f"Embedding output: {vector}\n"


def test_dse_is_served_with_its_template(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    import requests

    with served("serve_dse", folder_of, monkeypatch) as address:
        part = {"type": "image_url", "image_url": {"url": data_url(1)}}
        content = [part, {"type": "text", "text": "What is shown in this image?"}]
        body = {"model": "MrLight/dse-qwen2-2b-mrl-v1", "messages": [{"role": "user", "content": content}]}
        tokens = requests.post(f"{address}/tokenize", json=body, timeout=60).json()["tokens"]
        end = requests.post(f"{address}/detokenize", json={"tokens": tokens[-12:]}, timeout=60).json()["prompt"]
        assert end.endswith("assistant\n<|endoftext|>")
        vector = requests.post(f"{address}/v1/embeddings", json=body | {"dimensions": 16}, timeout=60).json()
        assert len(vector["data"][0]["embedding"]) == 16


def test_fetch_timeout_comes_from_the_variable_of_the_page():
    _, assignment = (BLOCKS / "timeout.sh").read_text().split()
    name, value = assignment.split("=")
    assert value == "<timeout>"
    assert serving_settings({}, {name: "7"})["image_fetch_timeout_s"] == 7.0
