"""From a budget to a plan."""
