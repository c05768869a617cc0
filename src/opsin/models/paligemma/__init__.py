"""PaliGemma and PaliGemma 2: a square picture before a prompt that sees all of itself."""
