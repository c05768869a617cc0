"""Pictures: what their bytes are, how large, and the pixels a model wants of them. No torch, no transformers.

``sniff`` names the format and reads the header; ``source`` holds one picture in any form a caller may give;
``decode`` makes RGB of it; ``ops`` carries out a ``PixelPlan``; ``pool`` does both in worker processes; ``fetch``
turns a URL into bytes.
"""
