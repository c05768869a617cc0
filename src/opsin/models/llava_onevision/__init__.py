"""LLaVA-OneVision: LLaVA-NeXT's tiles at up to six times the size, mosaics shrunk where they grow too large."""
