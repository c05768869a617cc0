"""LLaVA-1.5 and checkpoints of its architecture (``LlavaForConditionalGeneration``)."""
