"""What may be asked of a model where no text is generated, and how long its vectors may be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.errors import RequestError
from opsin.params import PoolingParams

_TASKS = ("embed", "token_embed", "pick")


@dataclass(frozen=True, slots=True)
class VectorSizes:
    """The lengths that a model's vectors may be cut to (Matryoshka representation learning, arXiv:2205.13147).

    Attributes:
        full: the hidden size.
        listed: the lengths that config.json's ``matryoshka_dimensions`` names; any up to ``full`` where it names none.
        cuttable: False where its ``is_matryoshka`` is false. Few of the models that can be cut say so, hence a config
            without the key does not forbid it.
    """

    full: int
    listed: tuple[int, ...] = ()
    cuttable: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], hidden_size: int) -> VectorSizes:
        """Read a checkpoint's config.json."""
        listed = tuple(sorted(config.get("matryoshka_dimensions") or ()))
        return cls(hidden_size, listed, bool(listed) or config.get("is_matryoshka") is not False)

    def check(self, dimensions: int) -> None:
        """Refuse a length that the model's vectors cannot be cut to.

        Raises:
            RequestError: ``param`` is "dimensions".
        """
        if dimensions > self.full:
            problem = f"this model's vectors have {self.full}"
        elif not self.cuttable and dimensions != self.full:
            problem = f"this model's vectors mean nothing when cut (is_matryoshka is false); it must be {self.full}"
        elif self.listed and dimensions not in (*self.listed, self.full):
            problem = f"this model's may be {', '.join(map(str, self.listed))} (matryoshka_dimensions)"
        else:
            return
        raise RequestError(f"dimensions is {dimensions}; {problem}.", param="dimensions")


def check_pooling(params: PoolingParams, sizes: VectorSizes) -> None:
    """Refuse a task that no model here has a head for, and vectors of the wrong length.

    Raises:
        RequestError: ``param`` is the field.
    """
    if params.task not in _TASKS:
        raise missing_head(params.task)
    if params.dimensions is not None:
        sizes.check(params.dimensions)


def missing_head(task: str) -> RequestError:
    """What to say to those who ask for a head that no model here has."""
    return RequestError(
        f"The task {task!r} needs a classification head, which no served architecture has. To weigh given answers "
        "against one another use pick (LLM.pick, POST /v1/pick); to compare inputs by their vectors use score "
        "(LLM.score, POST /score).",
        param="task",
    )
