"""Tables, figures and plain data of plans, runs, comparisons and benches."""
