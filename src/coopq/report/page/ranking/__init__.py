"""The pages of comparisons and benches."""
