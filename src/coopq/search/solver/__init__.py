"""The binary quadratic program of a budget, and how it is solved."""
