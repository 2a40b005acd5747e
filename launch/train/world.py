"""The world that torchrun describes to a rank, in environment variables. Imports no torch."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nanotron_recipes.errors import UserError, show_value
from nanotron_recipes.machine import CONNECTIONS, CONNECTIONS_VARIABLE
from nanotron_recipes.recipe import Recipe

_HOW = "start ranks with: torchrun --nproc-per-node 2 -m launch.train -- RECIPE"


@dataclass(frozen=True)
class World:
    """This rank's place: of `size` ranks the one with number `rank`, on its machine with number `local_rank`."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def described_by(cls, environment: Mapping[str, str]) -> "World":
        """Raises UserError, naming the variable, where one is missing or cannot be right."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            raise UserError(f"RANK and WORLD_SIZE are not set; {_HOW}")
        size = _number(environment, "WORLD_SIZE", 1, 1 << 20)
        rank = _number(environment, "RANK", 0, size - 1)
        local_rank = _number({"LOCAL_RANK": "0", **environment}, "LOCAL_RANK", 0, size - 1)
        _number(environment, "MASTER_PORT", 1, 65535)
        _check_host(environment.get("MASTER_ADDR", ""))
        return cls(rank, size, local_rank)


def check_connections(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Raise UserError where nanotron's asynchronous tensor-parallel layers would meet another number of connections to
    a GPU than they need."""
    parallelism, value = recipe.parallelism, environment.get(CONNECTIONS_VARIABLE)
    overlaps = parallelism.tp_linear_async_communication and parallelism.tp_mode == "REDUCE_SCATTER"
    if overlaps and parallelism.tp > 1 and value != CONNECTIONS:
        raise UserError(
            f"{CONNECTIONS_VARIABLE}: {show_value(value)}: expected {CONNECTIONS}, or no such variable, with "
            f"parallelism.tp {parallelism.tp} and parallelism.tp_linear_async_communication: true"
        )


def _check_host(host: str) -> None:
    if not host:
        raise UserError(f"MASTER_ADDR is not set; {_HOW}")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(f"MASTER_ADDR: {show_value(host)}: cannot be found ({error.strerror}); {_HOW}") from error
    except UnicodeError as error:
        raise UserError(f"MASTER_ADDR: {show_value(host)}: expected a host name; {_HOW}") from error


def _number(environment: Mapping[str, str], name: str, lowest: int, highest: int) -> int:
    if name not in environment:
        raise UserError(f"{name} is not set; {_HOW}")
    text = environment[name].strip()
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    if not is_number or not lowest <= int(text) <= highest:
        raise UserError(
            f"{name}: {show_value(environment[name])}: expected a number from {lowest} to {highest}; {_HOW}"
        )
    return int(text)
