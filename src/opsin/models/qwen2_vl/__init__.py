"""Qwen2-VL and Qwen2.5-VL: pictures and videos at their own resolution, positions in three axes (M-RoPE)."""
