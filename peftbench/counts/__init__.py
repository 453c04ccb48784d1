"""Counting: build a run without weights, count its parameters, solve its budget, explain its method."""
