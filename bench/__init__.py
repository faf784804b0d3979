"""Measurements: every speed and memory figure this project states comes from here."""
