"""YAML read strictly: every mistake is a ConfigError with its line, and nothing in a file can crash or fill the memory.

PyYAML parses; the values are built here, by the core rules of YAML 1.2, because PyYAML keeps the last of two equal
keys without a word, takes `1e-4` for a string, `no` for false and `1:30` for 90. Allowed are mappings with words as
keys, lists, strings, numbers, booleans and null; anchors, aliases and `<<` too, as long as they stay small.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml

from .errors import ConfigError

DEPTH = 40  # of nesting
SIZE = 200_000  # values in a file, aliases counted as often as they stand there

_TAG = "tag:yaml.org,2002:"
_CORE = {  # what a plain word is, by the core schema of YAML 1.2
    "null": re.compile(r"~|null|Null|NULL|", re.ASCII),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE", re.ASCII),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
    ),
}
Lines = dict[tuple, int]  # path of keys and indices -> line, from 1


class _RefusedError(Exception):
    """What is wrong at `line`."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the core rules for plain words, and with bounds on depth and size."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # of the finished nodes, by id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        self.depth += 1
        if self.depth > DEPTH:
            raise _RefusedError(line, f"nested more than {DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.sizes:
                raise _RefusedError(line, f"*{event.anchor} stands inside what it refers to")
        else:
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in _children(node))
        if self.sizes[id(node)] > SIZE:
            raise _RefusedError(line, f"more than {SIZE} values (aliases count as often as they stand there)")
        return node


for _name, _pattern in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern.pattern})$", re.ASCII), None)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every string that `read`, or PyYAML itself, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _CORE.items():
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern.pattern})$", re.ASCII), None)


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def read(text: str, name: str) -> tuple[Any, Lines]:
    """The value in `text`, and the line of every key and list item. An empty text is None.

    Raises ConfigError, "NAME, line N: ...", for everything that is not strict YAML.
    """
    lines: Lines = {}
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(node, (), lines)), lines
    except _RefusedError as error:
        raise ConfigError(f"{name}, line {error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}, line {line}: not valid YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(
            f"{name}, line {line}: not valid YAML: the character {chr(int(error.character))!r} may not stand there"
        ) from error
    except (ValueError, OverflowError, RecursionError, IndexError) as error:  # PyYAML's own slips, e.g. "\Uffffffff"
        line = loader.line + 1 if loader is not None else 1
        raise ConfigError(f"{name}, line {line}: not valid YAML: {error}") from error


def _value(node: Any, where: tuple, lines: Lines) -> Any:
    kind = node.tag.removeprefix(_TAG)
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, where, lines)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        items = []
        for index, item in enumerate(node.value):
            lines[*where, index] = item.start_mark.line + 1
            items.append(_value(item, (*where, index), lines))
        return items
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        try:  # JSON writes characters beyond the first 65536 as two halves
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            words = f"{_short(node.value)} holds half of a surrogate pair, which is no character"
            raise _RefusedError(line, words) from None
    if isinstance(node, yaml.ScalarNode) and kind in _CORE:
        return _scalar(kind, node.value, line)
    raise _RefusedError(
        line,
        f"{_short(node.tag)} is not allowed; a value is a mapping, a list, a string, a number, true, false or null",
    )


def _scalar(kind: str, text: str, line: int) -> Any:
    if not _CORE[kind].fullmatch(text):
        raise _RefusedError(line, f"{_short(text)} is no {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:
        raise _RefusedError(line, f"a number of {len(text)} digits is too long") from error


def _mapping(node: Any, where: tuple, lines: Lines) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    merged_lines: Lines = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
            given = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise _RefusedError(line, f"{_short(given)} stands where a key must stand; keys are words (or in quotes)")
        if key.value == "<<" and key.style is None:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in reversed(parts):  # of several the first wins
                if not isinstance(part, yaml.MappingNode):
                    raise _RefusedError(line, "<< takes a mapping, or a list of mappings")
                merged |= _value(part, where, merged_lines)
            continue
        name = _value(key, where, lines)
        if name in own:
            raise _RefusedError(
                line, f"{_short(name)} is given twice (the first time in line {lines[*where, name]}); keep one"
            )
        lines[*where, name] = line
        own[name] = _value(value, (*where, name), lines)
    lines |= {at: line for at, line in merged_lines.items() if at[len(where)] not in own}
    return merged | own


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def write(value: Any) -> str:
    """`value` as YAML that `read` and other readers give back equal; keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
