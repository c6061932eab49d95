"""`python -m moesim`: the command line."""

from moesim.cli.main import main

main()
