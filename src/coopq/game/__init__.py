"""The loss of an assignment: measured by engines, kept in a journal."""
