"""Saved models, and the files that engines load."""
