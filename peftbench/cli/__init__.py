"""The command line: a file for each subcommand. Commands parse, call the folders below and print."""
