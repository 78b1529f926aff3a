"""Rendering: a DriftReport in, text out."""
