"""`python -m uptrain` is `uptrain`."""

from uptrain.cli import main

main()
