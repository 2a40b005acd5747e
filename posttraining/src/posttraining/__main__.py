"""`python -m posttraining`, the same as the console script."""

from posttraining.cli import main

if __name__ == "__main__":  # a process that this one spawns imports the module again
    main()
