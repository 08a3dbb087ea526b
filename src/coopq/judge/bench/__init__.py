"""Many cases, seeds and methods side by side."""
