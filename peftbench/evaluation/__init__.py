"""Evaluation: predictions for whole data sets, their scores, and finished runs that are evaluated again."""
