"""Adapters of other libraries: finished runs in their formats, and their files as finished runs."""
