"""What becomes of vLLM's settings that opsin has not under the same name. The documentation prints this table.

They are spelt as flags here; ``without`` reads them as keywords of ``LLM``.

A flag that would change what clients get is refused, with what to use instead. One that is about speed, memory or logs
alone is accepted, and a line says what opsin does. A few stand for flags of opsin's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast


class Foreign(NamedTuple):
    """Some flags of vLLM with one answer.

    Attributes:
        flags: their names without dashes, between blanks. A switch ``x`` is also turned off by ``no-x``.
        takes: the values behind one.
        told: what opsin does instead, or what to use.
        only: the values that are accepted, between blanks; None is all of them, "" none. A switch may always be off.
        becomes: the word that it stands for; the value, where it takes one, comes behind it.
    """

    flags: str
    takes: Literal["nothing", "value", "values"]
    told: str
    only: str | None = None
    becomes: str = ""

    @property
    def names(self) -> list[str]:
        """The flags as they are written."""
        return ["--" + name for name in self.flags.split()]

    @property
    def choice(self) -> str:
        """What is accepted of a flag that is accepted with some values, in words."""
        values = (self.only or "").split()
        return " or ".join(values) if len(values) < 5 else f"{values[0]} to {values[-1]}"


_KERNELS = "opsin chooses its kernels and captures its CUDA graphs by itself; --enforce-eager does without graphs"
_STEPS = "a step is bounded by --max-num-batched-tokens and --max-num-tokens-beside-decodes; prompts are split to fit"
_HOST = "weights, keys and values stay on the device; a request that loses its blocks is computed again"
_ONE_GPU = "one GPU runs the whole model, in one process"
_PIXELS = "not pixels are kept but the features made of them: --vision-cache-gb says how many"
_LOGS = "the log has one line per request, and never a prompt or an answer"
_STATISTICS = "/metrics and /load have what there is to see"
_SPECULATION = "every step makes one token of each answer"
_FORMS = "llguidance holds answers to forms; a request says itself how its JSON is spaced"
_LOADING = "weights are read from safetensors files, one after the other"
_SERVERS = "run one server per GPU, and a load balancer before them"
ADAPTERS = "opsin has no adapters; merge them into the checkpoint (peft's merge_and_unload)"
_PLUGINS = "opsin loads no code by name"
_FP8 = "opsin quantizes to FP8 and INT8 (--quantization), and takes checkpoints that are FP8"
_NO_ROUTE = "opsin has nothing of the kind"

TABLE: tuple[Foreign, ...] = (
    # Other names for flags of opsin's.
    Foreign("shutdown-timeout", "value", "it is --drain-timeout-s here", becomes="--drain-timeout-s"),
    Foreign(
        "language-model-only",
        "nothing",
        "it is --limit-mm-per-prompt image=0,video=0 here",
        becomes="--limit-mm-per-prompt=image=0,video=0",
    ),
    # Speed.
    Foreign("enable-chunked-prefill disable-chunked-mm-input scheduler-reserve-full-isl", "nothing", _STEPS),
    Foreign(
        "max-num-partial-prefills max-long-partial-prefills long-prefill-token-threshold max-num-scheduled-tokens "
        "prefill-schedule-interval scheduler-delay-factor num-scheduler-steps num-lookahead-slots watermark",
        "value",
        _STEPS,
    ),
    Foreign("async-scheduling", "nothing", "--pipeline-depth says how many steps are in flight"),
    Foreign(
        "compilation-config optimization-level kernel-config attention-config attention-backend performance-mode "
        "max-seq-len-to-capture max-cudagraph-capture-size mm-encoder-attn-backend mm-encoder-attn-dtype "
        "linear-backend moe-backend mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode "
        "mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm gdn-prefill-backend kda-prefill-backend "
        "replayssm-buffer-len ir-op-priority override-attention-dtype additional-config",
        "value",
        _KERNELS,
    ),
    Foreign("cudagraph-capture-sizes cuda-graph-sizes", "values", _KERNELS),
    Foreign(
        "disable-cascade-attn enable-flashinfer-autotune enable-cumem-allocator disable-hybrid-kv-cache-manager "
        "kv-sharing-fast-prefill use-fp64-gumbel use-replayssm enable-bf16x3-router-gemm use-v2-block-manager "
        "enable-mamba-cache-stochastic-rounding enable-flash-late-interaction",
        "nothing",
        _KERNELS,
    ),
    Foreign(
        "speculative-config speculative-model num-speculative-tokens spec-method spec-model spec-tokens",
        "value",
        _SPECULATION,
    ),
    Foreign("stream-interval", "value", "every token is sent as soon as it is there"),
    Foreign("renderer-num-workers", "value", "--media-workers says how many processes decode pictures"),
    Foreign(
        "tokenizer-pool-size tokenizer-pool-type tokenizer-pool-extra-config", "value", "four threads read prompts"
    ),
    Foreign("disable-frontend-multiprocessing", "nothing", "the engine always is a process of its own"),
    Foreign("mm-encoder-tp-mode", "value", _ONE_GPU),
    Foreign(
        "distributed-executor-backend distributed-timeout-seconds cpu-distributed-timeout-seconds all2all-backend "
        "data-parallel-backend data-parallel-address data-parallel-rpc-port data-parallel-supervisor-port "
        "dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s "
        "master-addr master-port dcp-comm-backend dcp-kv-cache-interleave-size cp-kv-cache-interleave-size ubatch-size "
        "expert-placement-strategy eplb-config dbo-decode-token-threshold dbo-prefill-token-threshold",
        "value",
        _ONE_GPU,
    ),
    Foreign(
        "disable-custom-all-reduce enable-expert-parallel enable-eplb enable-ep-weight-filter enable-dbo "
        "disable-nccl-for-dp-synchronization worker-use-ray engine-use-ray",
        "nothing",
        _ONE_GPU,
    ),
    Foreign("numa-bind", "nothing", "the system places processes; numactl binds them"),
    Foreign("numa-bind-cpus numa-bind-nodes", "values", "the system places processes; numactl binds them"),
    Foreign("cpunodebind membind physcpubind", "value", "the system places processes; numactl binds them"),
    # Memory.
    Foreign(
        "swap-space cpu-offload-gb offload-backend offload-group-size offload-num-in-group offload-prefetch-step "
        "kv-offloading-size kv-offloading-backend preemption-mode",
        "value",
        _HOST,
    ),
    Foreign("cpu-offload-params offload-params", "values", _HOST),
    Foreign("kv-cache-dtype-skip-layers", "values", "--kv-cache-dtype holds for every layer"),
    Foreign("calculate-kv-scales", "nothing", "keys and values of 8 bits (--kv-cache-dtype fp8) need no scales"),
    Foreign(
        "mm-processor-cache-gb mm-processor-cache-type mm-shm-cache-max-object-size-mb mm-tensor-ipc "
        "mm-ipc-gpu-memory-gb",
        "value",
        _PIXELS,
    ),
    Foreign("disable-mm-preprocessor-cache", "nothing", _PIXELS),
    Foreign("skip-mm-profiling", "nothing", "the memory plan comes from a run that is measured at start"),
    Foreign(
        "prefix-caching-hash-algo mm-hasher-algorithm prefix-match-unit",
        "value",
        "prompts and pictures go by digests of their content",
    ),
    Foreign(
        "model-loader-extra-config safetensors-load-strategy safetensors-prefetch-block-size "
        "safetensors-prefetch-num-threads max-parallel-loading-workers pt-load-map-location",
        "value",
        _LOADING,
    ),
    Foreign("ignore-patterns", "values", _LOADING),
    Foreign("use-tqdm-on-load", "nothing", _LOADING),
    # Logs and statistics.
    Foreign("enable-log-requests disable-log-requests enable-log-outputs enable-log-deltas", "nothing", _LOGS),
    Foreign("max-log-len log-config-file", "value", _LOGS),
    Foreign("log-error-stack", "nothing", "the log says where a request failed that should not have"),
    Foreign(
        "disable-log-stats aggregate-engine-logging enable-logging-iteration-details kv-cache-metrics "
        "cudagraph-metrics enable-mfu-metrics enable-layerwise-nvtx-tracing ray-workers-use-nsight jit-monitor-verbose "
        "enable-server-load-tracking",
        "nothing",
        _STATISTICS,
    ),
    Foreign(
        "kv-cache-metrics-sample show-hidden-metrics-for-version jit-monitor-mode profiler-config otlp-traces-endpoint "
        "collect-detailed-traces",
        "value",
        _STATISTICS,
    ),
    # What opsin does in any case.
    Foreign("enable-request-id-headers", "nothing", "every answer has an X-Request-Id"),
    Foreign("enable-offline-docs", "nothing", "/docs loads nothing from elsewhere"),
    Foreign("enable-mm-embeds", "nothing", "image_embeds are always taken, and held to the model's shapes"),
    Foreign("interleave-mm-strings", "nothing", "pictures among texts keep their places"),
    Foreign("code-revision", "value", "the code of a checkpoint is never run"),
    Foreign("fail-on-environ-validation", "nothing", "of vLLM's variables only VLLM_IMAGE_FETCH_TIMEOUT is read"),
    Foreign("h11-max-incomplete-event-size h11-max-header-count", "value", "the head of a request may have 64 KiB"),
    Foreign("guided-decoding-backend structured-outputs-config", "value", _FORMS),
    Foreign("guided-decoding-disable-fallback", "nothing", _FORMS),
    Foreign("enable-reasoning", "nothing", "opsin serve --reasoning-parser is enough"),
    Foreign("cohere-is-reasoning-model", "nothing", "there are no routes of Cohere's"),
    Foreign("cohere-format", "value", "there are no routes of Cohere's"),
    # Taken with some values.
    Foreign(
        "pipeline-parallel-size data-parallel-size data-parallel-size-local prefill-context-parallel-size "
        "decode-context-parallel-size nnodes api-server-count",
        "value",
        _SERVERS,
        "1",
    ),
    Foreign("data-parallel-rank data-parallel-start-rank node-rank", "value", _SERVERS, "0"),
    Foreign("response-role", "value", "OpenAI's clients know no other role", "assistant"),
    Foreign("tokenizer-mode", "value", "tokenizers are opened as transformers opens them", "auto hf"),
    Foreign("config-format", "value", "convert the checkpoint to the form of Hugging Face", "auto hf"),
    Foreign("model-impl", "value", "opsin has models of its own alone; 'opsin models' lists them", "auto vllm"),
    Foreign("convert", "value", "use --runner pooling for vectors", "auto none"),
    Foreign("max-logprobs", "value", "an answer tells at most 20 alternatives", " ".join(map(str, range(21)))),
    Foreign("logprobs-mode", "value", "opsin tells log-probabilities before temperature and top-p", "raw_logprobs"),
    Foreign("fingerprint-mode", "value", "answers have no system_fingerprint", "full hash none"),
    # Refused.
    Foreign(
        "enable-lora enable-lora-bias fully-sharded-loras enable-tower-connector-lora enable-mixed-moe-lora-format "
        "enable-moe-shared-loras specialize-active-lora enable-prompt-adapter",
        "nothing",
        ADAPTERS,
        "",
    ),
    Foreign(
        "max-loras max-lora-rank max-cpu-loras lora-extra-vocab-size lora-dtype default-mm-loras "
        "long-lora-scaling-factors max-prompt-adapters max-prompt-adapter-token",
        "value",
        ADAPTERS,
        "",
    ),
    Foreign("lora-modules lora-target-modules prompt-adapters", "values", ADAPTERS, ""),
    Foreign("reasoning-config", "value", "max_tokens bounds an answer together with what was thought before it", ""),
    Foreign("middleware logits-processors", "values", _PLUGINS, ""),
    Foreign(
        "logits-processor-pattern reasoning-parser-plugin tool-parser-plugin tool-server io-processor-plugin "
        "worker-cls worker-extension-cls scheduler-cls model-class-overrides",
        "value",
        _PLUGINS,
        "",
    ),
    Foreign("download-dir", "value", "set HF_HUB_CACHE to the folder, or give the model as a folder", ""),
    Foreign("hf-token", "value", "set HF_TOKEN, or run 'hf auth login': others see command lines", ""),
    Foreign("hf-config-path", "value", "use --hf-overrides, or a folder with the config.json", ""),
    Foreign("rope-scaling rope-theta", "value", "use --hf-overrides", ""),
    Foreign("tokenizer-revision", "value", "give --tokenizer a folder", ""),
    Foreign("skip-tokenizer-init", "nothing", "prompts may be token ids all the same", ""),
    Foreign("device-ids", "values", "set CUDA_VISIBLE_DEVICES", ""),
    Foreign("quantization-config quantization-param-path", "value", _FP8, ""),
    Foreign("allow-deprecated-quantization", "nothing", _FP8, ""),
    Foreign("disable-sliding-window", "nothing", "use --max-model-len", ""),
    Foreign("pooler-config override-pooler-config", "value", "a request says its task and dimensions", ""),
    Foreign("fingerprint-value", "value", "answers have no system_fingerprint", ""),
    Foreign("enable-ssl-refresh", "nothing", "restart the server when its certificate changes", ""),
    Foreign("guided-decoding-disable-any-whitespace", "nothing", _FORMS, ""),
    Foreign("guided-decoding-disable-additional-properties", "nothing", "say additionalProperties in the schema", ""),
    Foreign("video-pruning-rate video-pruning-method", "value", "--media-io-kwargs says how many frames are taken", ""),
    Foreign(
        "mm-encoder-only enable-prompt-embeds enable-return-routed-experts enable-sleep-mode enable-elastic-ep "
        "enable-fault-tolerance enable-per-request-metrics enable-tokenizer-info-endpoint tokens-only headless grpc "
        "data-parallel-external-lb data-parallel-hybrid-lb data-parallel-multi-port-external-lb",
        "nothing",
        _NO_ROUTE,
        "",
    ),
    Foreign(
        "kv-transfer-config ec-transfer-config kv-events-config weight-transfer-config fault-tolerance-config "
        "diffusion-config mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-path mm-encoder-fp8-scale-save-margin "
        "override-neuron-config",
        "value",
        _NO_ROUTE,
        "",
    ),
)


SERVED: Mapping[str, str] = {
    "reasoning_parser": "texts of LLM hold what the model thinks; a form begins behind it with "
    "StructuredOutputsParams(thinking=...)",
}
"""Keywords of vLLM's ``LLM`` that are flags of ``opsin serve`` alone, and what there is instead."""


def find(name: str) -> Foreign | None:
    """The row of a flag as it is written, ``--no-`` included; None where vLLM has no such flag, or opsin has it."""
    for row in TABLE:
        if name in row.names or (row.takes == "nothing" and "--" + name.removeprefix("--no-") in row.names):
            return row
    return None


def without(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords as callers of vLLM's ``LLM`` write them, less those that change nothing here.

    None is the default, whatever the setting. Modalities of vLLM's that opsin has not may be limited to 0.

    Returns:
        What is left, for ``EngineConfig`` to take or refuse; and what is to be told of the rest.
    """
    left: dict[str, Any] = {}
    notices: list[str] = []
    for name, value in settings.items():
        row = find("--" + name.replace("_", "-"))
        if value is None or (row is not None and row.takes == "nothing" and not row.becomes and value is False):
            continue
        if row is not None and not row.becomes and (row.only is None or str(value) in row.only.split()):
            if row.only is None:
                notices.append(f"{name} changes nothing here: {row.told}.")
            continue
        if name == "limit_mm_per_prompt" and isinstance(value, Mapping):
            limits = cast("Mapping[str, Any]", value)
            value = {key: limit for key, limit in limits.items() if key not in _NO_MODALITIES or limit != 0}
        left[name] = value
    return left, notices


_NO_MODALITIES = ("audio", "vision_chunk")
