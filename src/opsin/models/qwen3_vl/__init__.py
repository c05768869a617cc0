"""Qwen3-VL (dense): pictures whose features reach several layers; videos with the time of each frame."""
