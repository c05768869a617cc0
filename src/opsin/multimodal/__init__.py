"""The public name of the media that go with a prompt; ``opsin.inputs`` has the rest."""

from opsin.inputs import MultiModalDataDict

__all__ = ["MultiModalDataDict"]
