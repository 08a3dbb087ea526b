"""Searches: which assignments to measure next."""
