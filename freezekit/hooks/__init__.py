"""Hooks for training loops: thin, each only translates its framework's events."""
