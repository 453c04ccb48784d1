"""Sweeps: the plan of the runs, the sweeper that trains them one after another or side by side, and their status."""
