"""Every key of a recipe as a page of the documentation.

python -m nanotron_recipes.key_reference          writes docs/recipe-keys.md again
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanotron_recipes.errors import show_value
from nanotron_recipes.fields import Key, all_keys, keys_of
from nanotron_recipes.files import write_atomic
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.section import Section

PAGE_FILE = Path(__file__).resolve().parents[1] / "docs" / "recipe-keys.md"
_HEAD = """# The keys of a recipe

Written by `make docs` from the [schema](../nanotron_recipes/schema); how a recipe is read stands in
[recipes.md](recipes.md). Sections and keys are nanotron's, as in the files that Hugging Face published for SmolLM3, and
new ones in the same manner. A key with *no effect* is accepted, and `validate` says so: such files can be used as they
are. `[]` stands for each entry of a list."""
_TYPES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "object": "section",
    "null": "null",
}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def key_reference() -> str:
    """Return the page: a table of the sections, then one for each section."""
    parts = [_HEAD, *_section(Recipe, "", None)]
    for path, key in all_keys():
        if key.section:
            parts += _section(key.section, f"{path}{'[]' if key.repeated else ''}", key.no_effect)
    return "\n".join(parts) + "\n"


def _section(section: type[Section], path: str, no_effect: str | None) -> Iterator[str]:
    yield f"\n## {f'`{path}`' if path else 'Sections'}\n"
    if no_effect:
        yield f"*No effect:* {_text(no_effect)}.\n"
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    schema = section.model_json_schema()["properties"]
    for name, key in keys_of(section).items():
        yield f"| {' | '.join((f'`{name}`', _value(schema[name]), _default(key), _meaning(key)))} |"


def _value(schema: dict[str, Any]) -> str:
    """What a key takes, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_value(choice) for choice in schema["anyOf"])
    if "$ref" in schema:
        return "section"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = _value(schema["items"])
        return "sections" if items == "section" else f"list of {items}"
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in _LIMITS.items() if limit in schema]
    return " ".join((_TYPES[schema["type"]], ", ".join(limits).replace("<", "&lt;"))).strip()


def _default(key: Key) -> str:
    if key.field.is_required():
        description = key.field.description or ""
        return "as it says" if "Null:" in description or "Default:" in description else "**required**"
    value = key.field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "as below"
    return f"`{value}`" if isinstance(value, str) and value else f"`{show_value(value)}`"


def _meaning(key: Key) -> str:
    no_effect = f" *No effect:* {_text(key.no_effect)}." if key.no_effect else ""
    return _text(key.field.description or "") + no_effect


def _text(text: str) -> str:
    """One line of Markdown that shows the text as it is."""
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def main() -> None:
    write_atomic(PAGE_FILE, key_reference())


if __name__ == "__main__":
    main()
