"""N-gram language models: ARPA files, look-up tables, estimation, words over pieces."""
