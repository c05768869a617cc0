"""Idefics3 and SmolVLM: rows of tiles with a tag each, then the whole picture; pixel shuffle."""
