"""python -m derc."""

from derc.cli import main

main()
