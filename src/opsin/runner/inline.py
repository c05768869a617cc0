"""The executor that runs steps in the engine's own process, on one device."""

from __future__ import annotations

from opsin.runner.executor import MemoryPlan, Payload, PendingStep
from opsin.runner.runner import ModelRunner
from opsin.types import ModelSpec, StepPlan


class InlineExecutor:
    """``Executor`` over one ``ModelRunner``.

    Args:
        graphs_of: the most tokens and patches of a step, where steps are to be replayed as graphs if the device can.
    """

    def __init__(self, runner: ModelRunner, memory: MemoryPlan, *, graphs_of: tuple[int, int] | None = None) -> None:
        self._runner = runner
        self._memory = memory
        runner.allocate_kv(memory.num_blocks)
        if graphs_of is not None:
            runner.capture_graphs(*graphs_of)

    @property
    def spec(self) -> ModelSpec:
        return self._runner.model.spec

    @property
    def memory(self) -> MemoryPlan:
        return self._memory

    def put_payload(self, key: bytes, payload: Payload) -> None:
        self._runner.put_payload(key, payload)

    def launch(self, plan: StepPlan) -> PendingStep:
        return self._runner.launch(plan)

    def shutdown(self) -> None:
        """Free the KV cache; weights go with the executor."""
        self._runner.allocate_kv(0)
