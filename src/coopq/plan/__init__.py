"""From a budget to a plan: methods, plans, forecasts."""
