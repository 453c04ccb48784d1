"""Helpers that every folder uses and that know nothing of the method."""
