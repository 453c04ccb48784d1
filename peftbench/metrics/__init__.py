"""Metrics, and the bootstrap over examples."""
