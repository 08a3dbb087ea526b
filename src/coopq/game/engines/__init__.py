"""What measures assignments: one process with shared prefixes, layer by layer, or workers of a cluster."""
