"""One client's share: so many requests a minute, and so many at once."""

from __future__ import annotations

import threading

import httpx
import openai
import pytest

from opsin import AsyncLLM
from opsin.server import quota
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.errors import RateLimitedError
from opsin.server.quota import Quotas
from tests.server.conftest import NAME, chat, serving

URL = "/v1/chat/completions"


def test_bucket_fills_up_again_and_is_each_clients_own():
    now = [50.0]
    quotas = Quotas(3, None, clock=lambda: now[0])

    def ask(name: str) -> None:
        with quotas.enter(name):
            pass

    for _ in range(3):
        ask("a")
    with pytest.raises(RateLimitedError) as refusal:
        ask("a")
    assert refusal.value.headers == {
        "Retry-After": "20",
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "20.0s",
    }
    ask("b")
    now[0] += 19
    with pytest.raises(RateLimitedError):
        ask("a")
    now[0] += 1
    ask("a")
    now[0] += 1000  # no more than a minute's worth is saved up
    for _ in range(3):
        ask("a")
    with pytest.raises(RateLimitedError):
        ask("a")


def test_running_requests_are_counted_until_they_end_however_they_do():
    quotas = Quotas(None, 1)

    def fail() -> None:
        with quotas.enter("a"):
            with pytest.raises(RateLimitedError), quotas.enter("a"):
                pass
            with quotas.enter("b"):
                pass
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


def test_clients_that_went_away_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quota, "_MAX_CLIENTS", 10)
    quotas = Quotas(5, 5)
    with quotas.enter("runs"):
        for i in range(50):
            with quotas.enter(str(i)):
                pass
        assert len(quotas._clients) == 10
        assert "runs" in quotas._clients


def test_key_over_its_quota_gets_429_and_another_does_not(engine: AsyncLLM):
    config = ServerConfig(api_key=("one", "two"), max_requests_per_minute=2)
    with serving(create_app(engine, config, model=NAME)) as address, httpx.Client(base_url=address, timeout=30) as http:
        one, two = ({"Authorization": f"Bearer {key}"} for key in config.api_key)
        answers = [http.post(URL, json=chat(max_tokens=1), headers=one) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert http.get("/v1/models", headers=one).status_code == 200
        assert http.post(URL, json=chat(max_tokens=1), headers=two).status_code == 200
        assert 'status="429",code="rate_limit_exceeded"} 1' in http.get("/metrics", headers=two).text


def test_openai_client_waits_and_succeeds(engine: AsyncLLM):
    config = ServerConfig(max_requests_per_key=1)
    app = create_app(engine, config, model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, timeout=30, trust_env=False) as http:
        with http.stream("POST", URL, json=chat(stream=True, max_tokens=400)) as first:
            lines = first.iter_lines()
            next(lines)
            assert http.post(URL, json=chat()).status_code == 429
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=60)
            found: list[str | None] = []

            def ask() -> None:
                answer = client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=1
                )
                found.append(answer.choices[0].finish_reason)

            asking = threading.Thread(target=ask)
            asking.start()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        asking.join(20)
        client.close()
    assert found == ["length"]
