"""Loading a model, finding its players, running it block by block."""
