"""`python -m posttraining`, the same as the console script."""

from posttraining.cli import main

main()
