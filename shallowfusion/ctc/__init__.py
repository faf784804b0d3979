"""CTC prefix beam search with language models inside."""
