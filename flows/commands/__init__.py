"""The commands of the program `bimode`, a module each; `flows.cli` puts them together.

A module holds one function with the command's name, whose parameters are its options and whose docstring is its help,
and `EXAMPLES`, shown below the help. What Prefect or a browser of data needs is imported when the command runs, so that
`--help` answers at once.
"""
