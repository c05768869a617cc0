"""LLaVA-NeXT, also called LLaVA-1.6: an overview of the picture, then tiles of it at up to three times the size."""
