"""What the pages tell a reader to type: commands are parsed by what they call, Python by what the package has.

A command line of ``fused-gopd`` goes through the command's own options and checks, without its work; other commands
name files, targets, extras and options that exist. Python compiles, and what it takes of the package is there, with the
arguments that it gives. test_snippets runs it, test_links follows the links.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

import click
import pytest
import tomllib
import torch
import typer
from typer.testing import CliRunner

import fused_gopd as fg
from fused_gopd.cli import app, bench, reproduce
from fused_gopd.cli.distill import options
from fused_gopd.cli.inspect.options import InspectOptions
from fused_gopd.token_stats import TokenStats
from pages import FENCE, ROOT, fences, read_pages

PAGES = read_pages("README.md", "CONTRIBUTING.md", "tests/*.md", "benchmarks/*.md", "examples/*.md", "docs/**/*.md")
COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
_PROGRAMS = ("fused-gopd", "make", "python", ".venv/bin/python", "pip", "accelerate", "pytest", "hf")


def typed(page: str) -> Iterator[list[str]]:
    """The words of each command line of a page: in a block, in a line of text of a block, or within a sentence."""
    rest = FENCE.sub("", PAGES[page])
    blocks = fences(PAGES[page], "bash", "console", "") + re.findall(r"^    .*$(?:\n    .*$)*", rest, re.MULTILINE)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest)]
    for line in [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans:
        line = re.sub(r"^.*?(?=fused-gopd \w+ --)", "", line.strip().removeprefix("$ "))
        line = re.sub(r"^(\w+=\S+ +)+", "", line)
        if line.split(" ")[0] in _PROGRAMS:
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_one_to_read(page: str) -> None:
    """Not too long; and its fences are of the languages that are known here, so that none is left unread."""
    assert PAGES[page].count("\n") <= 400 or page == "docs/performance-log.md"
    fenced = FENCE.findall(PAGES[page])
    assert {language for language, _ in fenced} <= {"", "bash", "console", "json", "python", "text", "toml", "yaml"}
    assert len(re.findall(r"^ *(?:```|~~~)", PAGES[page], re.MULTILINE)) == 2 * len(fenced)


LINES = [pytest.param(page, words, id=f"{page}: {' '.join(words)}") for page in PAGES for words in typed(page)]


def test_commands_are_found() -> None:
    """In blocks, over several lines, behind a prompt, within a sentence and in a line of output."""
    found = [" ".join(line.values[1]) for line in LINES]
    assert "make demo" in found
    assert sum(line.startswith("fused-gopd") for line in found) > 20
    assert "fused-gopd distill --resume --output run" in found
    assert any(line.startswith("fused-gopd plan --model llama-3-70b") and "--memory 16GiB" in line for line in found)
    assert "python tests/helpers/native_counts.py --write" in found


@pytest.mark.parametrize(("page", "words"), LINES)
def test_a_command_of_the_pages_is_one(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = words
    if program == "fused-gopd":
        call(arguments, tmp_path, monkeypatch)
    elif program == "make":
        for argument in arguments:
            defined = r"^{} \?=" if "=" in argument else r"^{}:"
            assert re.search(defined.format(argument.partition("=")[0]), (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program in ("pip", "hf"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"^(?:fused-gopd|\.)\[([\w,-]+)\]", "\n".join(arguments), re.MULTILINE):
            assert set(named.split(",")) <= extras.keys()
    else:
        script(page, program, arguments)


def call(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command without its work: its options are converted, and checked with each other."""
    command, *rest = arguments
    if command in ("--help", "--version"):
        return
    assert command in COMMANDS
    if not rest:
        return  # the command is spoken of
    monkeypatch.chdir(folder)
    if "--config" in rest:
        (file,) = fences(PAGES["docs/distill.md"], "yaml")
        Path(rest[rest.index("--config") + 1]).write_text(file)
        for name in re.findall(r"(\./\S+)", file):
            Path(name).mkdir(exist_ok=True)
    context = COMMANDS[command].make_context(command, list(rest))
    if command == "distill" and not context.params["resume"]:
        given = {name: value for name, value in context.params.items() if name in options.RunOptions.names()}
        for file in filter(None, (given["prompts"], given["eval_prompts"])):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()
        monkeypatch.setattr(options, "_check_packages", lambda _: None)
        options.for_new_run(context.params["output"], {**given, "teacher": given["teacher"] or []})
    if command == "inspect":
        given = {name: x for name, x in context.params.items() if name in InspectOptions.__dataclass_fields__}
        chosen = InspectOptions(**given)
        chosen.path.touch()
        chosen.check()
    if command in ("doctor", "demo", "distill", "inspect"):
        return
    for module in (bench, reproduce):
        monkeypatch.setattr(module, "_run", lambda *_: {"skipped": []})
        monkeypatch.setattr(module, "_print", lambda *_: None)
    monkeypatch.setattr(bench.benchmarks_module("report"), "plot", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in rest)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def script(page: str, program: str, arguments: list[str]) -> None:
    """A module or a script of the repository has the options that it is given; paths are from where the page says."""
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
    if len(arguments) < 2 - program.endswith("python") or module.partition(".")[0] not in ("", "benchmarks"):
        return  # of others, or spoken of
    if program == "python" and arguments[0] in ("-c", "-X"):
        return  # the interpreter's own
    where = re.findall(r"^cd (\S+)$", PAGES[page], re.MULTILINE)
    files = [ROOT / folder / argument for argument in arguments for folder in ("", *where)]
    package, _, names = module.rpartition(".")
    for name in names.split("|"):
        base = ROOT / package.replace(".", "/") / name
        files += [base.with_suffix(".py"), base / "run.py"]
        assert not name or files[-2].is_file() or files[-1].is_file(), name
    files += [path.parent / "conftest.py" for path in files if program == "pytest" and path.is_file()]
    sources = [path.read_text() for path in files if path.is_file()]
    assert sources, f"no file of {arguments} exists"
    options_of_others = ("--benchmark-json",) if program == "pytest" else ("--config_file",)
    if any("TrlParser" in source for source in sources):
        trl = pytest.importorskip("fused_gopd.integrations.trl")
        sources += [f'"--{field.name}"' for field in dataclasses.fields(trl.GOPDConfig)]
        sources += [f'"--{name}"' for name in re.findall(r"^    (\w+): ", "\n".join(sources), re.MULTILINE)]
        options_of_others += ("--config",)
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        assert option in options_of_others or any(f'"{option}"' in source for source in sources), option


# ----------------------------------------------------------------------------------------- options within a sentence

OTHERS = {  # of other programs
    "docs/coming-from.md": None,
    "docs/off-policy.md": None,
    "docs/integrations/README.md": None,
    "docs/integrations/server.md": {"--logprobs-mode", "--no-enable-prefix-caching"},
}


@pytest.mark.parametrize("page", [page for page in PAGES if OTHERS.get(page, {}) is not None])
def test_an_option_within_a_sentence_exists(page: str) -> None:
    of = {"docs/distill.md": "distill", "docs/planning.md": "plan", "docs/reproduction.md": "reproduce"}.get(page)
    commands = COMMANDS.values() if of is None else [COMMANDS[of]]
    known = {name for command in commands for p in command.params for name in (*p.opts, *p.secondary_opts)}
    known |= {"--help"} | (OTHERS.get(page) or set())
    if of is None:
        scripts = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/**/*.py")]
        known |= {name for path in scripts for name in re.findall(r'"(--[\w-]+)"', path.read_text())}
    spans = re.findall(r"`(--[^`]+)`", FENCE.sub("", PAGES[page]))
    assert {word for span in spans for word in span.split() if word.startswith("--")} <= known


def test_the_parts_of_a_distill_command_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options with values within a sentence of docs/distill.md, in a command with what else each of them needs."""
    spans = re.findall(r"`(--[\w-]+ [^`]+)`", FENCE.sub("", PAGES["docs/distill.md"]))
    assert len(spans) > 5
    needs = {"--save": "--lora 8", "--teacher": "", "--teacher-server": "", "--ref": "--reward-scale 1.25"}
    needs |= {"--support": "--estimator topk --k 20", "--teacher-cache-gib": "--teacher-cache C"}
    needs |= dict.fromkeys(("--teacher-ema", "--teacher-sync-steps"), "--teacher student --teacher-system S")
    server = next(span for span in spans if span.startswith("--teacher-server "))
    for span in [*spans, f"{server} --estimator topk --k 20"]:
        rest = f"{span} {needs.get(span.split(' ')[0], '')}"
        rest += " --teacher-system S" if span == "--teacher student" else ""
        rest += "" if re.search(r"--teacher(-server)? ", rest) else " --teacher T"
        call(
            ["distill", "--student", "M", "--prompts", "p.jsonl", "--output", "run", *shlex.split(rest)],
            tmp_path,
            monkeypatch,
        )


# --------------------------------------------------------------------------------------------------------------- Python


def resolve(path: str) -> Any:
    """What a dotted name of the package is; None where its module needs a framework that is not installed."""
    names = path.split(".")
    places = [(i, ROOT / "src" / "/".join(names[:i])) for i in range(len(names), 0, -1)]
    sources = [(i, file) for i, at in places for file in (at.with_suffix(".py"), at / "__init__.py") if file.is_file()]
    i, source = sources[0]
    try:
        found = importlib.import_module(".".join(names[:i]))
    except ModuleNotFoundError as error:
        if str(error.name).startswith("fused_gopd"):
            raise
        defined = i == len(names) or re.search(rf"^((class|def) )?{names[i]}\b", source.read_text(), re.MULTILINE)
        assert defined, path
        return None
    for name in names[i:]:
        found = member(found, name)
    return found


def member(of: Any, name: str) -> Any:
    """An attribute of a module or class, or the type of a field of instances; None where that is not known."""
    if inspect.isclass(of):
        if name in getattr(of, "__annotations__", {}):
            hint = typing.get_type_hints(of)[name]
            return hint if inspect.isclass(hint) and hint.__module__.startswith("fused_gopd") else None
        assert hasattr(of, name) or any(name in vars(base).get("__slots__", ()) for base in of.__mro__), f"{of}.{name}"
    else:
        assert hasattr(of, name), f"{of} has no {name}"
    return getattr(of, name, None)


def keywords(function: Any) -> set[str]:
    """The keyword arguments of a function or class, also those that it passes on."""
    if inspect.isclass(function):
        found: set[str] = set()
        for base in function.__mro__:
            if "__init__" in vars(base):
                parameters = inspect.signature(base.__init__).parameters
                found |= parameters.keys()
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    return found
        return found | inspect.signature(fg.gopd_loss).parameters.keys()
    parameters = inspect.signature(function).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return parameters.keys() | (inspect.signature(fg.gopd_loss).parameters.keys() if passes_on else set())


class Reader(ast.NodeVisitor):
    """Follows what a page takes of the package, from block to block."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {"fg": fg, "fused_gopd": fg, "out": fg.GOPDOutput, "stats": TokenStats}
        self.checked = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == "fused_gopd":
                self.known[alias.asname or alias.name] = resolve(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            ours = (node.module or "").partition(".")[0] == "fused_gopd"
            self.known[alias.asname or alias.name] = resolve(f"{node.module}.{alias.name}") if ours else None
            self.checked += ours

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.known[node.name] = None
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        """Arguments are not known, but for the argument of a function of advantages."""
        if not isinstance(node, ast.Lambda):
            self.known[node.name] = None
        outside = dict(self.known)
        self.known |= {argument.arg: TokenStats if argument.arg == "stats" else None for argument in node.args.args}
        self.generic_visit(node)
        self.known = outside

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.known[target.id] = self.type_of(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.type_of(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = self.type_of(node.func)
        if not (callable(function) and getattr(function, "__module__", "").startswith("fused_gopd")):
            return
        self.checked += 1
        if hasattr(function, "forward") and ast.unparse(node.func).rpartition(".")[2] != function.__name__:
            function = functools.partial(function.forward, None)  # the call of a module that the page has made
        given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        assert set(given) <= keywords(function), f"{ast.unparse(node.func)} has no {set(given) - keywords(function)}"
        words = [ast.unparse(argument) for argument in node.args]
        if not any(word == "..." or word.startswith("*") for word in words):
            named = inspect.signature(function).parameters
            inspect.signature(function).bind_partial(*words, **{name: None for name in given if name in named})

    def type_of(self, node: ast.expr) -> Any:
        """A module, a class of which an expression is an instance, a function; None where that is not known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            of = self.type_of(node.value)
            if isinstance(of, ModuleType) or (inspect.isclass(of) and of.__module__.startswith("fused_gopd")):
                self.checked += 1
                return member(of, node.attr)
        if isinstance(node, ast.Call):
            function = self.type_of(node.func)
            if inspect.isclass(function):
                return function
            if inspect.isfunction(function) and function.__module__.startswith("fused_gopd"):
                hint = typing.get_type_hints(function).get("return")
                kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
                return next((x for x in kinds if inspect.isclass(x) and x.__module__.startswith("fused_gopd")), None)
        return None


@pytest.mark.parametrize("page", [page for page in PAGES if fences(PAGES[page], "python") or ">>> " in PAGES[page]])
def test_python_of_the_pages_takes_what_the_package_has(page: str) -> None:
    reader = Reader()
    prompts = re.findall(r"^>>> (.*)$", PAGES[page], re.MULTILINE)
    for block in fences(PAGES[page], "python") + prompts:
        reader.visit(ast.parse(block))
    assert reader.checked


def test_a_mistake_in_python_is_seen() -> None:
    for line in (
        "fg.gopd_los(student)",
        "fg.gopd_loss(student, temperature=1)",
        "fg.gopd_loss(student, teacher).losses",
        "head = fg.LinearHead(hidden, weight)\nhead.scale",
        "fg.LinearHead(1, 2, 3, 4)",
        "out.metrics().reduce()",
        "stats.logprobs",
        "from fused_gopd.integrations.verl import GOPDLoss",
    ):
        with pytest.raises((AssertionError, TypeError)):
            Reader().visit(ast.parse(line))


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_of_the_package_exist(page: str) -> None:
    for path in re.findall(r"\b((?:fg|fused_gopd)(?:\.[A-Za-z_]\w*)+)", PAGES[page]):
        name = re.sub(r"^fg\.", "fused_gopd.", path)
        if not name.endswith((".py", ".so")):
            resolve(name)
