"""Pictures and videos: what their bytes are, how large, and the pixels a model wants. No torch, no transformers.

``sniff`` names the format and reads the header; ``source`` holds one picture in any form a caller may give;
``decode`` makes RGB of it; ``ops`` carries out a ``PixelPlan``; ``pool`` does both in worker processes; ``fetch``
turns a URL into bytes. Where a device resizes, ``raw`` says what is left to it, and ``resample`` with which numbers.
For videos, ``video`` reads headers and frames, ``clips`` is what ``source`` is for pictures, and ``prober`` has headers
read in processes that may die of it.
"""
