"""Plans by searches on the true loss, and what a run folder knows of other sizes."""
