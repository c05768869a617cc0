"""docs/grafana.json against a scrape of a server that has answered: no panel asks for what is not told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, assert_idle, chat, serving

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
METRIC = re.compile(r"(?:vllm|opsin):\w+")
GROUPED = re.compile(r"by \(([^)]*)\)")
VLLMS = """
e2e_request_latency_seconds time_to_first_token_seconds inter_token_latency_seconds prompt_tokens_total
generation_tokens_total num_requests_running num_requests_waiting kv_cache_usage_perc request_success_total
request_prompt_tokens request_generation_tokens request_queue_time_seconds request_prefill_time_seconds
request_decode_time_seconds request_inference_time_seconds request_max_num_generation_tokens iteration_tokens_total
mm_cache_queries_total mm_cache_hits_total prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total
request_time_per_output_token_seconds
""".split()


class Scrape:
    """Samples by metric name: labels and value of each."""

    def __init__(self, text: str) -> None:
        self.kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        self.samples: dict[str, list[tuple[set[str], float]]] = {}
        for name, labels, value in re.findall(r"^([a-z]+:\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            self.samples.setdefault(name, []).append((set(re.findall(r"(\w+)=", labels)), float(value)))


@pytest.fixture(scope="module")
def scrape(engine: AsyncLLM) -> Iterator[Scrape]:
    app = create_app(engine, ServerConfig(served_model_name=(NAME,)), model="root")  # one that counts from 0
    with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        for seed in (101, 101, 102):
            for fields in ({"n": 2}, {"stream": True}):
                assert client.post("/v1/chat/completions", json=chat(seed, "What?", **fields)).status_code == 200
        assert client.post("/v1/chat/completions", json={"model": "other", "messages": []}).status_code == 404
        assert_idle(app, engine)
        yield Scrape(client.get("/metrics").text)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_metric_of_a_panel_is_told(scrape: Scrape, panel: dict[str, Any]):
    assert panel["targets"]
    for target in panel["targets"]:
        names = METRIC.findall(target["expr"])
        assert names
        grouped = {label.strip() for group in GROUPED.findall(target["expr"]) for label in group.split(",")}
        for name in names:
            found = scrape.samples.get(name)
            assert found, f"{name} is not told"
            assert all(grouped <= labels for labels, _ in found), f"{name} has no {grouped}"


def test_metrics_that_are_told_are_all_shown(scrape: Scrape):
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", n) for p in PANELS for t in p["targets"] for n in METRIC.findall(t["expr"])
    }
    assert set(scrape.kinds) == shown


def test_dashboards_for_vllm_find_their_metrics(scrape: Scrape):
    assert {f"vllm:{name}" for name in VLLMS} <= set(scrape.kinds)


def test_what_happened_was_counted(scrape: Scrape):
    def total(name: str) -> float:
        return sum(value for _, value in scrape.samples[name])

    assert total("opsin:request_refusals_total") == 1
    for name, kind in scrape.kinds.items():
        if kind == "histogram" and name != "opsin:event_loop_lag_seconds":
            assert total(f"{name}_count") > 0, name
            assert total(f"{name}_sum") > 0, name
    assert total("vllm:mm_cache_queries_total") > total("vllm:mm_cache_hits_total") > 0
    assert total("opsin:pixels_decoded_total") > 0
    assert total("opsin:front_resident_memory_bytes") > 2**20
    assert total("opsin:engine_ready") == 1


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in PANELS
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
