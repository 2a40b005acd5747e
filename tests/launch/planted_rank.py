"""A rank of a run with a fault in its engine: `torchrun … -m planted_rank -- FAULT RECIPE --run NAME`, FAULT as in
`guard_plants`."""

import sys
from typing import Any

import guard_plants

from launch.train import rank
from launch.train.__main__ import main
from launch.train.engine import TrainingEngine

if __name__ == "__main__":
    # Some versions of argparse hand the `--` on.
    fault = next(argument for argument in sys.argv[1:] if argument != "--")
    sys.argv.remove(fault)
    plant = getattr(guard_plants, fault)

    class PlantedEngine(TrainingEngine):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            plant(self)

    rank.TrainingEngine = PlantedEngine  # type: ignore[misc]
    sys.exit(main())
