"""`python -m posttraining.pipeline_stage …`: `posttraining …` as the pipeline calls it.

The pipeline goes on by itself, so no stage says what to call next."""

import sys

from posttraining.cli import main

if __name__ == "__main__":  # a process that this one spawns imports the module again
    main(sys.argv[1:], last_line=False)
