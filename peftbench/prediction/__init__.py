"""Predictions of a model, in bulk: batches, beams that share their source, and what was already predicted."""
