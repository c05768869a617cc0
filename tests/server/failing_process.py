"""An engine process whose device fails on prompts of certain lengths; otherwise the real one."""

from __future__ import annotations

from opsin.engine import process
from opsin.runner.executor import PendingStep
from opsin.runner.inline import InlineExecutor
from opsin.types import StepPlan, StepResult

BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from tests.server import failing_process; "
    "sys.exit(failing_process.main(int(sys.argv[1])))"
)
OUT_OF_MEMORY = 37
"""Length of a prompt for which a step cannot have its memory: it raises when it is launched."""
STICKY = 41
"""Length of a prompt that breaks the device's context: known, as on CUDA, when a result is waited for."""


class Broken(PendingStep):
    """A step after which the device is not to be used any more."""

    def result(self) -> StepResult:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def main(descriptor: int) -> int:
    import torch

    launch = InlineExecutor.launch

    def launch_or_fail(self: InlineExecutor, plan: StepPlan) -> PendingStep:
        lengths = {opened.num_prompt_tokens for opened in plan.opened}
        if OUT_OF_MEMORY in lengths:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Broken() if STICKY in lengths else launch(self, plan)

    InlineExecutor.launch = launch_or_fail
    return process.main(descriptor)
