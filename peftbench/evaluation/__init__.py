"""Evaluation: predictions in bulk, their scores, and finished runs that are evaluated again."""
