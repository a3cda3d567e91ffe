"""The options of a run in a file of YAML, under the names of their flags: read for ``--config``, written by a run."""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer

from ... import installing
from ..parameters import require_packages
from .options import JSON, RunOptions

FILE = "run.yaml"
_HINT = "--config"


def use(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``: what the file has comes before the defaults, and behind the command line."""
    if path is not None:
        require_packages("--config", ["yaml"], installing.extra("train"))
        context.default_map = {**(context.default_map or {}), **_read(path)}
    return path


def _read(path: Path) -> dict[str, Any]:
    """Option -> its value as text, which is converted and checked like that of the command line."""
    yaml: Any = importlib.import_module("yaml")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint=_HINT) from None
    except (yaml.YAMLError, RecursionError) as error:  # thousands of brackets
        said = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        quotes = "a text that begins with { or [, or that has a colon and a space, needs quotes"
        raise typer.BadParameter(f"{path} is not YAML: {said} ({quotes})", param_hint=_HINT) from None
    if root is None:
        return {}
    known = {name.replace("_", "-"): name for name in ("output", *RunOptions.names())}
    entries = _entries(path, root, "the file must have a line `option: value` for each option")
    for key in entries:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {close[0]}?" if close else ", or none of a run"
            hint = f": write {key.removeprefix('no-')}: false" if key.removeprefix("no-") in known else hint
            raise typer.BadParameter(f"{path} has {key!r}, which is no option{hint}", param_hint=_HINT)
    found = {known[key]: _value(path, key, known[key], node) for key, node in entries.items()}
    return {name: value for name, value in found.items() if value is not None}


def _entries(path: Path, node: Any, expected: str) -> dict[str, Any]:
    """The entries of a mapping; keys are the texts that the file has."""
    yaml: Any = importlib.import_module("yaml")
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise typer.BadParameter(f"{path}, line {line}: {expected}", param_hint=_HINT)
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise typer.BadParameter(f"{path}, line {line}: a key must be a text", param_hint=_HINT)
        if key.value in found:
            line = key.start_mark.line + 1
            raise typer.BadParameter(f"{path}, line {line}: {key.value!r} is there twice", param_hint=_HINT)
        found[key.value] = value
    return found


def _value(path: Path, key: str, name: str, node: Any) -> Any:
    """An option's value; None where the file leaves it empty, which is the default."""
    yaml: Any = importlib.import_module("yaml")
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if name in RunOptions.names(JSON):
        if not _is_nested(node):
            return node.value
        try:
            written = json.dumps(yaml.SafeLoader("").construct_document(node), allow_nan=False)
            _require_single(path, node)
            return written
        except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:  # dates, recursive anchors, tags
            line = node.start_mark.line + 1
            wrong = f"{path}, line {line}: {key} must be what JSON has: {' '.join(str(error).split())}"
            raise typer.BadParameter(wrong, param_hint=_HINT) from None
    if name != "teacher":
        return _text(path, key, node)
    if isinstance(node, yaml.SequenceNode):
        return [_text(path, key, each) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        routes = _entries(path, node, "")
        for route in routes:
            if "=" in route:
                line = node.start_mark.line + 1
                raise typer.BadParameter(
                    f"{path}, line {line}: the name of a route has no =, got {route!r}", param_hint=_HINT
                )
        return [f"{route}={_text(path, key, each)}" for route, each in routes.items()]
    return [_text(path, key, node)]


def _require_single(path: Path, node: Any) -> None:
    """Raise for a key that is twice in a mapping, at any depth; the node has no cycle."""
    yaml: Any = importlib.import_module("yaml")
    if isinstance(node, yaml.MappingNode):
        for each in _entries(path, node, "").values():
            _require_single(path, each)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _require_single(path, each)


def _is_nested(node: Any) -> bool:
    return not isinstance(node.value, str)


def _text(path: Path, key: str, node: Any) -> str:
    if _is_nested(node):
        line = node.start_mark.line + 1
        wrong = f"{path}, line {line}: {key} must have one value; a text that begins with {{ or [ needs quotes"
        raise typer.BadParameter(wrong, param_hint=_HINT)
    return str(node.value)


def text(options: RunOptions) -> str:
    """The options of a run that are not their defaults, for ``--config``."""
    yaml: Any = importlib.import_module("yaml")
    found: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            found[field.name.replace("_", "-")] = value
    for name in RunOptions.names(JSON):
        if name.replace("_", "-") in found:
            found[name.replace("_", "-")] = json.loads(getattr(options, name))
    routes = options.routes()
    if routes:
        found["teacher"] = routes.get(None, routes)
    return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000))
