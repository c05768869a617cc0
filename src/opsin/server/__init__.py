"""The OpenAI-compatible HTTP server. ``app.create_app`` is the whole of it; nothing lives at module level.

Handlers know the engine only through ``client.EngineClient``.
"""
