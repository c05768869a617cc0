"""The ``opsin`` command: one file per command, flags generated from ``opsin.config``.

``main`` parses and dispatches; nothing heavy is imported before a command runs.
"""
