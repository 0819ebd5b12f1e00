"""Exporters: one package per target. They use longrope_export; nothing there uses them."""
