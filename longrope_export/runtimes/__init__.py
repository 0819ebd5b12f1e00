"""Exported models, run: one module per runtime."""
