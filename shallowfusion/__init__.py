"""Fused decoding of speech-recognition and language-model scores."""
