"""`python -m launch.cli …` is `nanotron-recipes …`, for jobs that run a copy of the code."""

from launch.cli.main import main

main()
