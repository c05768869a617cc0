"""LLaVA-OneVision: LLaVA-NeXT's tiles at up to six times the size, shrunk where they are too many; frames of videos."""
