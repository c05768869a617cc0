"""Gemma 3: a square picture of few features that see one another, and crops of it where asked."""
