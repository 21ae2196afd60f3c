"""`python cli.py …` from a checkout equals `uptrain …`."""

from uptrain.cli import main

main()
