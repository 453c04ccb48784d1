"""Backbones: loading a frozen model and its tokenizer, and the places in it that a method may modify."""
