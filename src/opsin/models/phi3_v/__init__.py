"""Phi-3-vision and Phi-3.5-vision: tiles of the picture, then an overview of them. As an embedding model: VLM2Vec."""
