"""Before the first step every rank opens its data, and all of them find out that it is the same."""

from data.plan import DataPlan
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe
from parallel.together import Group, gather


def open_same_data(recipe: Recipe, node: str, group: Group = None) -> DataPlan:
    """Open the recipe's data as this rank's node has it; a collective.

    Args:
        node: the name of this rank's node, for people.

    Raises:
        UserError: on all ranks, where data is missing or damaged on one of them, or not the same on all.
    """
    plan, mistake = None, ""
    try:
        plan = DataPlan.from_recipe(recipe)
    except UserError as error:
        mistake = str(error)
    found = gather((node, mistake, "" if plan is None else plan.fingerprint), group)
    nodes = {name for name, _, _ in found}
    for name, said, _ in found:
        if said:
            raise UserError(f"{name}: {said}" if len(nodes) > 1 else said)
    assert plan is not None, "a rank without a plan has said why"
    if len({fingerprint for _, _, fingerprint in found}) > 1:
        raise _different(plan, found, group)
    return plan


def _different(plan: DataPlan, found: list[tuple[str, str, str]], group: Group) -> UserError:
    """Names the first source that is not the same everywhere, and two nodes that differ."""
    sources = gather(plan.source_fingerprints, group)
    names = [node for node, _, _ in found]
    for source in plan.sources:
        for node, theirs in zip(names, sources, strict=True):
            if theirs[source] != sources[0][source]:
                return UserError(
                    f"{source}: {node} has other data ({theirs[source][:12]}) than {names[0]} "
                    f"({sources[0][source][:12]}); run `nanotron-recipes data stage RECIPE` on every node"
                )
    raise AssertionError("the fingerprint of all sources follows from those of each")
