"""How many parameters a run would train and store, without its weights: `peftbench params`.

command.py is the subcommand, counts.py the numbers of one run, table.py how they are printed.
"""
