"""Where a run's time goes: spans recorded around an engine's seams, a breakdown of them, and a trace for Perfetto.

The engine knows nothing of it: ``watching`` puts clocks around its methods from outside, while a run is watched.
"""

from opsin.cli.tracing.breakdown import breakdown, render
from opsin.cli.tracing.recorder import Recorder, Span
from opsin.cli.tracing.watch import watching

__all__ = ["Recorder", "Span", "breakdown", "render", "watching"]
