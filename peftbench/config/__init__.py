"""The configuration of a run: its schema, the four axes, what is refused, and how a command line becomes runs."""
