"""Methods compared over many models, backends, budgets and seeds."""
