"""Saved models and the files of engines."""
