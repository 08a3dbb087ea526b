"""Judging on held-out text and tasks: perplexity, comparisons, zero-shot accuracy, benches."""
