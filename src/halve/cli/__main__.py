"""`python -m halve.cli`."""

from halve.cli.main import main

main()
