"""peftbench: which parameter-efficient fine-tuning method, where in the network, how large, for my model and task.

A command-line tool over the four axes of He et al. (ICLR 2022, arXiv 2110.04366). Importing this package imports
no torch; the subcommands do that when they need it.
"""

__version__ = "0.1.0"
