"""Held-out judgement: perplexity, comparisons, tasks, benches."""
