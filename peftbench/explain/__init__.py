"""What a run's method is, in the paper's terms, and where it stands in the network: `peftbench explain`.

command.py is the subcommand; formula.py writes the four axes as a formula, sizes.py the number of parameters; tree.py
is one layer of each stack with what is inserted; explanation.py puts them together; show.py prints them, as JSON too.
"""
