"""LLaVA-1.5 and checkpoints of its shape: a square picture, a feature for each of its patches."""
