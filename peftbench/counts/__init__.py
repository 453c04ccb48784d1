"""Counts: a run built without weights, its parameters counted, budgets solved, methods explained."""
