"""Phrases whose tokens are favoured while they are being said."""
