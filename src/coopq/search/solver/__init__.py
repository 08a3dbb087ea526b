"""The quadratic program of a budget and its solutions."""
