"""Parts of scripts/drill.py."""
