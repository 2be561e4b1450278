"""The JSON schema of run files for editors, and the table of their keys for docs/run-files.md; both from the models."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from .config import Part, Relative, Rule, RunConfig, Standardise, section_in


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of run files, short forms included; for editors."""
    schema = RunConfig.model_json_schema()
    names = {"Model": ["string"], "MethodChoice": ["string"], "Part": ["string"]}
    lists = {"Prompts", "PromptSource"}
    for properties in [schema["properties"], *(part["properties"] for part in schema["$defs"].values())]:
        for key, field in properties.items():
            field.pop("title", None)
            properties[key] = _with_short_forms(field, names, lists)
    for part in schema["$defs"].values():
        part.pop("title", None)
    reward = schema["properties"]["reward"]
    one = reward.pop("items")
    schema["properties"]["reward"] = {
        "description": reward["description"],
        "anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rewardtune run file",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _with_short_forms(field: Any, names: dict[str, list[str]], lists: set[str]) -> Any:
    """`field` with a string (a list of strings) permitted wherever a section has a short form."""
    if not isinstance(field, dict):
        return field
    if "items" in field:
        field["items"] = _with_short_forms(field["items"], names, lists)
    if "anyOf" in field:
        field["anyOf"] = [_with_short_forms(member, names, lists) for member in field["anyOf"]]
    name = field.get("$ref", "").rpartition("/")[2]
    if name not in names and name not in lists:
        return field
    forms: list[dict[str, Any]] = [{"type": "string", "minLength": 1}]
    if name in lists:
        forms.append({"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1})
    rest = {key: value for key, value in field.items() if key != "$ref"}
    return {"anyOf": [*forms, {"$ref": field["$ref"]}], **rest}


def keys_table() -> str:
    """Every key of the run file as Markdown tables, a section each; docs/run-files.md holds it."""
    schema = json_schema()
    sections: list[tuple[str, type[BaseModel]]] = [
        ("", RunConfig),
        *((f"{key}.", model) for key, model in _sections(RunConfig)),
    ]
    sections += [
        ("reward.N.", Part),
        ("reward.N.relative.", Relative),
        ("reward.N.standardise.", Standardise),
        ("guards.rules.N.", Rule),
    ]
    blocks = []
    for prefix, model in sections:
        properties = (schema if model is RunConfig else schema["$defs"][model.__name__])["properties"]
        rows = [
            f"| `{prefix}{key}` | {_legal(field, schema)} | {_shown(model, key)} | {_cell(_meaning(field, schema))} |"
            for key, field in properties.items()
        ]
        title = prefix.rstrip(".") or "The run file"
        about = " ".join((model.__doc__ or "").split())
        blocks.append(
            "\n".join(
                [f"### {title}", "", about, "", "| key | legal | default | meaning |", "|---|---|---|---|", *rows]
            )
        )
    return "\n\n".join(blocks) + "\n"


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in model.model_fields.items():
        section = section_in(field.annotation)
        if section is None or section in (Part, Rule, Standardise):
            continue
        yield f"{prefix}{key}", section
        yield from _sections(section, f"{prefix}{key}.")


def _legal(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_legal(member, schema) for member in field["anyOf"]))
    if "$ref" in field:
        return "section"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{word}`" for word in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return "two numbers"
        return f"list of {_legal(field['items'], schema)}"
    bounds = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    limits = [text.format(_power(field[key])) for key, text in bounds.items() if key in field]
    name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    word = name.get(field.get("type", ""), {"null": "`null`", "object": "mapping"}.get(field.get("type", ""), "any"))
    return " ".join([word, ", ".join(limits)]).strip()


def _power(number: float) -> str:
    return "2^63" if number == 2**63 else f"{number:g}"


def _shown(model: type[BaseModel], key: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value = field.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _meaning(field: dict[str, Any], schema: dict[str, Any]) -> str:
    refs = [field, *field.get("anyOf", [])]
    names = [part["$ref"].rpartition("/")[2] for part in refs if "$ref" in part]
    return field.get("description") or (schema["$defs"][names[0]].get("description", "") if names else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
