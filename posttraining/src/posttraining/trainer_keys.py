"""The keys that TRL's config classes take, read from their source: importing them takes seconds, a typo should not."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

TRAINER_CONFIGS = {"sft": "SFTConfig", "prefer": "DPOConfig", "compare": "DPOConfig", "grpo": "GRPOConfig"}
"""TRL's config class of each stage that trains."""
_BASES = {"trl": "trainer/base_config.py", "transformers": "training_args.py"}
"""Where what all these classes inherit stands."""


def trainer_keys(stage: str) -> set[str] | None:
    """The fields of the config class that `stage` reads beside its own settings: all of them, and maybe names of other
    classes in the same files. Empty where it reads none; None where the source is not where it is expected."""
    if stage not in TRAINER_CONFIGS:
        return set()
    names: set[str] = set()
    own = f"trainer/{TRAINER_CONFIGS[stage].removesuffix('Config').lower()}_config.py"
    for package, file in [("trl", own), *_BASES.items()]:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            return None
        try:
            tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            return None
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            names |= {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return names
