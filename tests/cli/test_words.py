"""Command lines as vLLM's users write them."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import pytest

from opsin import vllm_settings
from opsin.cli import flags, words
from opsin.cli.main import build_parser, main
from opsin.errors import ConfigError

# Every flag of `vllm serve`, of 0.6.4 and of today.
SERVE_FLAGS = """
additional-config aggregate-engine-logging all2all-backend allow-credentials allow-deprecated-quantization
allowed-headers allowed-local-media-path allowed-media-domains allowed-methods allowed-origins api-key api-server-count
async-scheduling attention-backend attention-config block-size calculate-kv-scales chat-template
chat-template-content-format code-revision cohere-format cohere-is-reasoning-model collect-detailed-traces
compilation-config config config-format convert cp-kv-cache-interleave-size cpu-distributed-timeout-seconds
cpu-offload-gb cpu-offload-params cpunodebind cudagraph-capture-sizes cudagraph-metrics data-parallel-address
data-parallel-backend data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb
data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local data-parallel-start-rank
data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
dcp-kv-cache-interleave-size decode-context-parallel-size default-chat-template-kwargs default-mm-loras device
device-ids diffusion-config disable-access-log-for-endpoints disable-cascade-attn disable-chunked-mm-input
disable-custom-all-reduce disable-fastapi-docs disable-frontend-multiprocessing disable-hybrid-kv-cache-manager
disable-log-requests disable-log-stats disable-mm-preprocessor-cache disable-nccl-for-dp-synchronization
disable-sliding-window disable-uvicorn-access-log distributed-executor-backend distributed-timeout-seconds download-dir
dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dtype
ec-transfer-config enable-auto-tool-choice enable-bf16x3-router-gemm enable-chunked-prefill enable-cumem-allocator
enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage enable-layerwise-nvtx-tracing
enable-log-deltas enable-log-outputs enable-log-requests enable-logging-iteration-details enable-lora
enable-mamba-cache-stochastic-rounding enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds
enable-moe-shared-loras enable-offline-docs enable-per-request-metrics enable-prefix-caching enable-prompt-adapter
enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts
enable-server-load-tracking enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint
enable-tower-connector-lora enforce-eager eplb-config exclude-tools-when-tool-choice-none expert-placement-strategy
fail-on-environ-validation fault-tolerance-config fingerprint-mode fingerprint-value fully-sharded-loras
gdn-prefill-backend generation-config gpu-memory-utilization grpc guided-decoding-backend h11-max-header-count
h11-max-incomplete-event-size headless hf-config-path hf-overrides hf-token host ignore-patterns interleave-mm-strings
io-processor-plugin ir-op-priority jit-monitor-mode jit-monitor-verbose kda-prefill-backend kernel-config kv-cache-dtype
kv-cache-dtype-skip-layers kv-cache-memory-bytes kv-cache-metrics kv-cache-metrics-sample kv-events-config
kv-offloading-backend kv-offloading-size kv-sharing-fast-prefill kv-transfer-config language-model-only
limit-mm-per-prompt linear-backend load-format log-config-file log-error-stack logits-processor-pattern
logits-processors logprobs-mode long-prefill-token-threshold lora-dtype lora-modules lora-target-modules mamba-backend
mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm
master-addr master-port max-cpu-loras max-cudagraph-capture-size max-log-len max-logprobs max-lora-rank max-loras
max-model-len max-num-batched-tokens max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers
max-seq-len-to-capture media-io-kwargs membind middleware mm-encoder-attn-backend mm-encoder-attn-dtype
mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-only
mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type
mm-processor-kwargs mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-class-overrides model-impl
model-loader-extra-config moe-backend nnodes node-rank num-gpu-blocks-override num-lookahead-slots num-scheduler-steps
num-speculative-tokens numa-bind numa-bind-cpus numa-bind-nodes offload-backend offload-group-size offload-num-in-group
offload-params offload-prefetch-step optimization-level otlp-traces-endpoint override-attention-dtype
override-generation-config performance-mode physcpubind pipeline-parallel-size pooler-config port preemption-mode
prefill-context-parallel-size prefill-schedule-interval prefix-caching-hash-algo prefix-match-unit profiler-config
prompt-adapters pt-load-map-location quantization quantization-config quantization-param-path ray-workers-use-nsight
reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers replayssm-buffer-len response-role
return-tokens-as-token-ids revision root-path rope-scaling rope-theta runner safetensors-load-strategy
safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls scheduler-delay-factor
scheduler-reserve-full-isl scheduling-policy seed served-model-name show-hidden-metrics-for-version shutdown-timeout
skip-mm-profiling skip-tokenizer-init spec-method spec-model spec-tokens specialize-active-lora speculative-config
speculative-model ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile stream-interval
structured-outputs-config swap-space task tensor-parallel-size tokenizer tokenizer-mode tokenizer-pool-size
tokenizer-revision tokens-only tool-call-parser tool-parser-plugin tool-server trust-remote-code
trust-request-chat-template ubatch-size uds use-fp64-gumbel use-replayssm use-tqdm-on-load use-v2-block-manager
uvicorn-log-level video-pruning-method video-pruning-rate watermark weight-transfer-config worker-cls
worker-extension-cls worker-use-ray
""".split()


parser = functools.cache(build_parser)  # which takes a while, and nobody changes it


def given(line: str) -> dict[str, Any]:
    """The settings of a command line, and what is told of it."""
    args = vars(flags.parse(parser(), shlex.split(line)))
    return {name: value for name, value in args.items() if name not in ("function", "parser", "quiet")}


def settings(line: str) -> dict[str, Any]:
    result = given(line)
    assert result.pop("notices") == []
    return result


@functools.cache
def own_flags() -> set[str]:
    serve = flags.parse(parser(), ["serve"]).parser
    return {name for action in serve._actions for name in action.option_strings}


@pytest.mark.parametrize("flag", SERVE_FLAGS)
def test_flag_of_vllm_is_known_or_answered(flag: str) -> None:
    assert "--" + flag in own_flags() or vllm_settings.find("--" + flag) is not None


def test_table_answers_every_flag_once_and_none_of_opsins_own() -> None:
    names = [name for row in vllm_settings.TABLE for name in row.names]
    assert len(names) == len(set(names))
    assert not own_flags() & set(names)
    known = own_flags() | set(names)
    assert set(words.SHORT.values()) <= known
    assert {row.becomes.partition("=")[0] for row in vllm_settings.TABLE} - {""} <= known


@pytest.mark.parametrize("row", vllm_settings.TABLE, ids=lambda row: row.names[0])
def test_flag_of_vllms_is_answered_as_its_row_says(row: vllm_settings.Foreign) -> None:
    for name in row.names:
        value = {"nothing": "", "value": " 7", "values": " 7 8"}[row.takes]
        line = f"serve demo {name}{value} --port 1"
        if row.only is None:
            (notice,) = given(line)["notices"]
            assert name in notice
            assert row.told in notice
        else:
            with pytest.raises(ConfigError) as caught:
                given(line.replace("7", "21") if "7" in row.only.split() else line)
            assert name in str(caught.value)
            assert row.told in str(caught.value)
        for fine in (row.only or "").split():
            assert settings(f"serve demo {name} {fine}") == {"model": "demo"}
        if row.takes == "nothing":
            assert given(f"serve demo {name.replace('--', '--no-', 1)}")["model"] == "demo"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("serve m --api-key a b --served-model-name x y", {"api_key": ("a", "b"), "served_model_name": ("x", "y")}),
        ("serve --api-key a b --model m", {"api_key": ("a", "b")}),
        ("serve --api-key k -m m", {"api_key": ("k",)}),
        ("serve --api-key a --port 1 --api-key b c m/m", {"api_key": ("a", "b", "c"), "port": 1, "model": "m/m"}),
        ("serve --api-key k m/m", {"api_key": ("k",), "model": "m/m"}),
        ("serve --api-key k demo", {"api_key": ("k",), "model": "demo"}),
        ("serve --served-model-name a b m/m --port 1", {"served_model_name": ("a", "b"), "port": 1, "model": "m/m"}),
        ("serve --served-model-name m/m", {"served_model_name": ("m/m",), "model": None}),
        ("serve --enforce-eager m", {"enforce_eager": True}),
        ('serve m --api-key \'["a", "b"]\' c', {"api_key": ("a", "b", "c")}),
        ("serve m --allowed-media-domains a.org b.org,c.org", {"allowed_media_domains": ("a.org", "b.org", "c.org")}),
        ("chat m --allowed-media-domains a.org b.org", {"allowed_media_domains": ("a.org", "b.org"), "model": "m"}),
        ("bench latency --num-iters 3 m", {"num_iters": 3, "model": "m"}),
        ("run --allowed-media-domains a.org b.png", {"allowed_media_domains": ("a.org",), "model": None}),
    ],
)
def test_list_takes_several_words_and_leaves_the_model(line: str, expected: dict[str, Any]) -> None:
    found = settings(line)
    wanted = {"model": "m", **expected}
    assert {name: found.get(name) for name in wanted} == wanted


def test_model_behind_a_list_may_be_a_folder(tmp_path: Path) -> None:
    found = settings(f"serve --api-key k {tmp_path}")
    assert (found["api_key"], found["model"]) == (("k",), str(tmp_path))


@pytest.mark.parametrize(
    "line", ["serve --api-key sesame llava", "serve --api-key sesame m/m --served-model-name a b/c"]
)
def test_model_that_cannot_be_told_from_a_list_is_asked_for_and_no_key_told(line: str) -> None:
    with pytest.raises(ConfigError, match=r"opsin serve MODEL --api-key") as caught:
        given(line)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("--limit-mm-per-prompt.image 2", "limit_mm_per_prompt", {"image": 2}),
        (
            "--limit_mm_per_prompt.image=2 --limit-mm-per-prompt.video 0",
            "limit_mm_per_prompt",
            {"image": 2, "video": 0},
        ),
        (
            "--limit-mm-per-prompt image=1 --limit-mm-per-prompt.video 3",
            "limit_mm_per_prompt",
            {"image": 1, "video": 3},
        ),
        ("--mm-processor-kwargs.max_pixels 1000", "mm_processor_kwargs", {"max_pixels": 1000}),
        ("--hf-overrides.a.b_c true --hf-overrides.a.d x", "hf_overrides", {"a": {"b_c": True, "d": "x"}}),
        ("--hf-overrides.a+ 1 --hf-overrides.a+ x=y", "hf_overrides", {"a": [1, "x=y"]}),
    ],
)
def test_key_of_a_json_setting_stands_in_its_flag(line: str, name: str, expected: dict[str, Any]) -> None:
    assert settings(f"serve m {line}")[name] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve m --max-model 3", "unrecognized arguments: --max-model; did you mean --max-model-len?"),
        ("serve m --swap-spce 3", "did you mean --swap-space?"),
        ("run a.png What? --temp 0", "did you mean --temperature?"),
        ("run --image a.png", "--image; usage: opsin run [options] PICTURE... QUESTION (see"),
        ("chat m extra", "opsin chat: error: unrecognized arguments: extra; usage: opsin chat [options] [MODEL] (see"),
        ("bench latency --num-iter 3", "opsin bench latency: error: unrecognized arguments: --num-iter; did you mean"),
        ("bench latency --image-size 640", "(see opsin bench latency --help)"),
        ("models show", "(see opsin models show --help)"),
        ("--modle", "opsin: error: unrecognized arguments: --modle; usage: opsin [--version] COMMAND ... (see opsin"),
        ("chat --limit-mm-per-prompts.image 2", "did you mean --limit-mm-per-prompt?"),
        ("serve m --limit-mm-per-prompt. 3", "write --limit-mm-per-prompt.KEY VALUE"),
        ("serve m --hf-overrides.a", "write --hf-overrides.KEY VALUE"),
        ("serve m --api-key", "argument --api-key: expected one argument"),
        ("serve m --swap-space", "argument --swap-space: expected one argument"),
        ("serve m --port", "argument --port: expected one argument"),
        ("serve m --enforce-eager=yes", "ignored explicit argument 'yes'"),
        (
            "serve m --zzz",
            "unrecognized arguments: --zzz; usage: opsin serve [options] [MODEL] (see",
        ),
    ],
)
def test_flag_that_is_wrong_costs_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        given(line)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_short_and_dotted_flags_of_vllm_are_answered() -> None:
    found = given("serve m -O3 -O.mode=2 --compilation-config.mode 3 -q fp8 -pp 1 -tp 1 --enable-chunked-prefill True")
    assert (found["model"], found["quantization"], found["tensor_parallel_size"]) == ("m", "fp8", 1)
    flags_told = [notice.split()[0] for notice in found["notices"]]
    assert flags_told == ["--optimization-level", "--compilation-config.mode", "--enable-chunked-prefill"]


def test_flag_that_stands_for_another_sets_it() -> None:
    found = given("serve m --shutdown-timeout 3 --language-model-only")
    assert (found["drain_timeout_s"], found["limit_mm_per_prompt"]) == (3.0, {"image": 0, "video": 0})
    assert len(found["notices"]) == 2


def test_yaml_holds_flags_of_vllm_and_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "model: a/b\nswap-space: 4\nenable-chunked-prefill: true\nenable-lora: false\napi-key: [k, l]\n"
        "compilation-config: {mode: 3}\nlimit-mm-per-prompt: {image: 3}\ncudagraph-capture-sizes: [1, 2]\n"
    )
    found = given(f"serve --config {file} --api-key m n --limit-mm-per-prompt.video 1")
    assert (found["model"], found["api_key"]) == ("a/b", ("m", "n"))
    assert found["limit_mm_per_prompt"] == {"image": 3, "video": 1}
    told = [notice.split()[0] for notice in found["notices"]]
    assert told == ["--swap-space", "--enable-chunked-prefill", "--compilation-config", "--cudagraph-capture-sizes"]
    file.write_text("enable-lora: true\n")
    with pytest.raises(ConfigError, match="--enable-lora is not for opsin"):
        given(f"serve --config={file}")


def test_command_tells_of_flags_that_change_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "none"), "--port", "0", "--swap-space", "4"]) == 2
    (record,) = caplog.records
    assert (record.levelname, record.getMessage().split(":")[0]) == ("WARNING", "--swap-space changes nothing here")


def test_words_that_only_look_like_flags_are_text() -> None:
    assert settings('run a.png "--what is this?"')["inputs"] == ["a.png", "--what is this?"]
    assert settings('run a.png "--what_is this?"')["inputs"] == ["a.png", "--what_is this?"]
    assert settings("run --max_tokens 3 a.png -- --what_is")["inputs"] == ["a.png", "--what_is"]
    assert settings("chat --temperature -1")["temperature"] == -1
