"""Routes that generate nothing: pick, pooling, scores, rankings."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from opsin import AsyncLLM, PoolingParams
from tests.engine.conftest import picture
from tests.server.conftest import NAME, data_url, run_async, user

CHOICES = ["A", "two blue squares", "a red circle"]


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": NAME, **fields})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["model"] == NAME
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    return body


def vector(engine: AsyncLLM, prompt: Any) -> np.ndarray:
    return np.array(run_async(engine.embed(prompt)).outputs.embedding)


# ------------------------------------------------------------------------------------------------ pick


def test_pick_is_the_engines_own(client: httpx.Client, engine: AsyncLLM):
    expected = run_async(engine.pick(picture(1), "What is it?", CHOICES))
    body = post(client, "/v1/pick", image=data_url(1), question="What is it?", choices=CHOICES)
    assert body["object"] == "pick"
    assert body["id"].startswith("pick-")
    assert body["best"] == expected.best
    assert [choice["text"] for choice in body["choices"]] == CHOICES
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for told, choice in zip(body["choices"], expected.choices, strict=True):
        for name in ("probability", "raw_probability", "logprob", "num_tokens"):
            assert told[name] == pytest.approx(getattr(choice, name), abs=1e-4)


def test_pick_takes_messages_and_several_pictures(client: httpx.Client):
    parts = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in (1, 2)]
    asked = post(client, "/v1/pick", image=[data_url(1), data_url(2)], question="Same?", choices=CHOICES)
    named = post(client, "/v1/pick", images=[data_url(1), data_url(2)], question="Same?", choices=CHOICES)
    said = post(client, "/v1/pick", messages=user(*parts, "Same?"), choices=CHOICES)
    for a, *others in zip(asked["choices"], said["choices"], named["choices"], strict=True):
        assert [b["logprob"] for b in others] == pytest.approx([a["logprob"]] * 2, abs=1e-4)
    text = post(client, "/v1/pick", question="Same?", choices=CHOICES)
    assert text["usage"]["prompt_tokens"] < asked["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"choices": CHOICES}, "question"),
        ({"choices": CHOICES, "question": "a", "messages": user("a")}, "question"),
        ({"choices": CHOICES, "image": "data:,", "messages": user("a")}, "image"),
        ({"choices": CHOICES, "question": "a", "image": "data:,", "images": []}, "images"),
        ({"choices": CHOICES, "question": "a", "images": ["data:image/png;base64,AAAA"]}, "images"),
        ({"choices": ["a"], "question": "a"}, "choices"),
        ({"choices": ["a", "a"], "question": "a"}, "choices"),
        ({"choices": "yes,no", "question": "a"}, "choices"),
        ({"question": "a"}, "choices"),
        ({"choices": CHOICES, "question": "a", "image": "/etc/passwd"}, "image"),
        (
            {"choices": CHOICES, "question": "a", "image": ["data:image/png;base64,AAAA"]},
            "image",
        ),
    ],
)
def test_bad_pick_is_refused(client: httpx.Client, fields: dict[str, Any], param: str):
    response = client.post("/v1/pick", json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


# --------------------------------------------------------------------------------------------- pooling


def test_pooling_gives_the_vectors_of_all_tokens(client: httpx.Client, engine: AsyncLLM):
    body = post(client, "/pooling", input=["Hello there", "you"])
    assert body["object"] == "list"
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert {item["object"] for item in body["data"]} == {"pooling"}
    expected = run_async(engine.embed("Hello there", PoolingParams(task="token_embed"))).outputs.data
    found = np.array(body["data"][0]["data"])
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(found[-1], vector(engine, "Hello there"), atol=1e-5)


def test_pooling_of_one_vector_and_in_base64(client: httpx.Client, engine: AsyncLLM):
    (item,) = post(client, "/pooling", input="Hello", task="embed", dimensions=8)["data"]
    assert np.linalg.norm(item["data"]) == pytest.approx(1, abs=1e-5)
    assert len(item["data"]) == 8
    (item,) = post(client, "/pooling", messages=user(1, "Hello"), encoding_format="base64")["data"]
    numbers = np.frombuffer(base64.b64decode(item["data"]), "<f4").reshape(-1, engine.model_spec.hidden_size)
    assert np.allclose(np.linalg.norm(numbers, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("task", ["classify", "token_classify", "score"])
def test_tasks_that_need_a_head_are_refused_with_what_to_use(client: httpx.Client, task: str):
    response = client.post("/pooling", json={"input": "a", "task": task})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "task"
    assert "/v1/pick" in response.json()["error"]["message"]


def test_classify_is_refused_with_what_to_use(client: httpx.Client):
    response = client.post("/classify", json={"model": NAME, "input": "a"})
    assert response.status_code == 400
    assert "no served architecture" in response.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents")])
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_the_cosines_of_vectors(client: httpx.Client, engine: AsyncLLM, path: str, names: tuple[str, str]):
    texts = ["Hello there", "The quick brown fox", "Hello"]
    body = post(client, path, **{names[0]: "Hello", names[1]: texts})
    assert body["object"] == "list"
    first = vector(engine, "Hello")
    expected = [float(first @ vector(engine, text)) for text in texts]
    assert [item["score"] for item in body["data"]] == pytest.approx(expected, abs=1e-4)
    assert [(item["index"], item["object"]) for item in body["data"]] == [(i, "score") for i in range(3)]
    by_one = post(client, path, **{names[0]: texts, names[1]: texts})
    assert [item["score"] for item in by_one["data"]] == pytest.approx([1, 1, 1], abs=1e-4)


def test_scores_of_pictures_go_through_the_template(client: httpx.Client, engine: AsyncLLM):
    part = {"type": "image_url", "image_url": {"url": data_url(1)}}
    text = {"type": "text", "text": "Describe."}
    body = post(client, "/score", data_1={"content": [part, text]}, data_2=[{"content": [part, text]}, "Hello"])
    prompt = {"prompt": "USER: <image>\nDescribe. ", "multi_modal_data": {"image": picture(1)}}
    same, other = (item["score"] for item in body["data"])
    assert same == pytest.approx(1, abs=1e-4)
    assert other == pytest.approx(float(vector(engine, prompt) @ vector(engine, "Hello")), abs=1e-4)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_in_the_order_of_their_scores(client: httpx.Client, engine: AsyncLLM, path: str):
    documents = ["The quick brown fox", "Hello", "Hello there"]
    query = vector(engine, "Hello")
    scores = [float(query @ vector(engine, text)) for text in documents]
    body = post(client, path, query="Hello", documents=documents)
    order = sorted(range(3), key=lambda i: -scores[i])
    assert [result["index"] for result in body["results"]] == order
    assert [result["relevance_score"] for result in body["results"]] == pytest.approx(
        [scores[i] for i in order], abs=1e-4
    )
    assert body["results"][0]["document"] == {"text": "Hello", "multi_modal": None}
    (best,) = post(client, path, query="Hello", documents=documents, top_n=1)["results"]
    assert best == body["results"][0]


def test_documents_may_be_pictures(client: httpx.Client):
    parts = [[{"type": "image_url", "image_url": {"url": data_url(seed)}}] for seed in (1, 2)]
    body = post(client, "/rerank", query={"content": parts[1]}, documents=[{"content": each} for each in parts])
    assert [result["index"] for result in body["results"]] == [1, 0]
    assert body["results"][0]["document"] == {"text": None, "multi_modal": parts[1]}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/score", {}, "text_1"),
        ("/score", {"text_1": "a", "data_2": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "data_2"),
        ("/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": {"contents": "a"}}, "text_2.content"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        *(
            (path, {**fields, "truncate_prompt_tokens": 4}, "truncate_prompt_tokens")
            for path, fields in (
                ("/score", {"text_1": "a", "text_2": "b"}),
                ("/rerank", {"query": "a", "documents": ["b"]}),
                ("/v1/embeddings", {"input": "a"}),
            )
        ),
        ("/pooling", {}, "input"),
        ("/pooling", {"input": "a", "task": "sing"}, "task"),
    ],
)
def test_bad_comparison_is_refused(client: httpx.Client, path: str, fields: dict[str, Any], param: str):
    response = client.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
