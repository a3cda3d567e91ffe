"""The documentation site: ``make docs`` builds the pages of this folder and the API reference from the docstrings.

Sphinx with furo and myst-parser: Material for MkDocs reaches its end of life on 5 May 2027 (its release 9.8.1), these
are developed. The pages stay plain Markdown that GitHub shows; what only the site has is added here.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
import typer
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import mock
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from typer.cli import get_docs_for_click

from fused_gopd import options
from fused_gopd.cli import app as command_line

HERE = Path(__file__).parent
ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
log = logging.getLogger(__name__)

project = PROJECT["name"]
author = "The fused-gopd authors"
copyright = author
version = release = PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images"]
nitpicky = True  # a role that names nothing is a warning, where the name is of this package
nitpick_ignore_regex = [(r"py:.*", r"(?!fused_gopd\b).*|.*\.[TPRC]")]  # others' names, type variables
smartquotes = False  # -- begins an option
myst_heading_anchors = 4
myst_enable_extensions = ["alert"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Attributes", "params_style")]  # a list
autodoc_preserve_defaults = True
autodoc_mock_imports = ["nemo_rl", "prime_rl", "skyrl", "skyrl_train", "swift", "verl"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}

# The navigation, by page. A page that is missing here is a warning.
NAVIGATION = {
    "Start": ["install", "quickstart", "examples", "guide", "teachers", "troubleshooting"],
    "Use": [
        "objectives",
        "topk",
        "targets",
        "per-token",
        "terms",
        "sft",
        "off-policy",
        "distill",
        "self-distillation",
        "warnings",
        "reports",
        "tokenizers",
        "parallelism",
        "planning",
        "paper-settings",
        "pytorch-compatibility",
        "versions",
    ],
    "Integrations": [
        *[f"integrations/{name}" for name in ("README", "transformers", "trl", "verl", "server")],
        "coming-from",
    ],
    "API reference": [
        f"api/{name}" for name in ("loss", "models", "results", "distributed", "trl", "integrations", "cli")
    ],
    "Background": ["performance", "demo", "reproduction", "mathematics", "design", "gpu-kernels", "performance-log"],
    "Project": ["changelog", "contributing"],
    "中文": ["index.zh", "quickstart.zh", "guide.zh"],
}
# Pages that are files of other folders, whose links are from there.
ELSEWHERE = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "examples": "examples/README.md"}
# Modules all of whose public names the API reference must have.
_INTEGRATIONS = "liger logprobs ms_swift nemo_rl prime_rl server skyrl slime tokenizers transformers trl verl"
PUBLIC = ["fused_gopd", "fused_gopd.distributed", "fused_gopd.html", "fused_gopd.reference"]
PUBLIC += [f"fused_gopd.integrations.{name}" for name in _INTEGRATIONS.split()]


# ------------------------------------------------------------------------------------------ what pages have on the site


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in reStructuredText, whose columns are as wide as their cells ask for."""
    lines = [".. list-table::", "   :header-rows: 1", "   :class: options", ""]
    for row in [head, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join([*lines, "", ""])


def typed(kind: Any) -> str:
    """An annotation, short."""
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", kind if isinstance(kind, str) else kind.__name__)


def option_tables() -> str:
    """The arguments of the loss, from the fields of LossCall: what every estimator has, and what one of them has."""
    fields = {f.name: f for f in dataclasses.fields(options.LossCall)}
    of_all = ("Models and tensors of a batch", "Options of every estimator")
    groups: dict[str, list[list[str]]] = {group: [] for group in of_all}
    for name in options.ARGUMENTS:
        rule, default = options.RULES[name], fields[name].default
        said = rule.help
        if not all(repr(choice) in said for choice in rule.choices):
            said += f" One of {', '.join(f'``{choice!r}``' for choice in rule.choices)}."
        if rule.needs:
            said += f" Needs ``{rule.needs}``."
        row = [
            f"``{name}``",
            f"``{'str' if rule.choices else typed(fields[name].type)}``",
            "required" if default is dataclasses.MISSING else f"``{default!r}``",
            said,
        ]
        for group in [f'Of estimator="{one}"' for one in rule.of] or [of_all[name in options.OPTIONS]]:
            groups.setdefault(group, []).append(row)
    head = ["name", "type", "default", "meaning"]
    return "\n".join(f"{title}\n{'~' * len(title)}\n\n{table(head, rows)}" for title, rows in groups.items())


def config_table() -> str:
    """The fields that GOPDConfig adds to TRL's."""
    from fused_gopd.integrations.trl import GOPDConfig, config

    ours = {name for kind in (config.Options, GOPDConfig) for name in vars(kind)["__annotations__"]}
    rows = [
        [f"``{f.name}``", f"``{typed(f.type)}``", f"``{f.default!r}``", f.metadata["help"]]
        for f in dataclasses.fields(GOPDConfig)
        if f.name in ours
    ]
    return table(["field", "type", "default", "meaning"], rows)


def command_options() -> str:
    """The commands and their options, as typer documents them."""
    group = typer.main.get_command(command_line)
    context = group.make_context(group.name, [], resilient_parsing=True)
    _, heading, commands = get_docs_for_click(obj=group, ctx=context, name=group.name).partition("\n## ")
    return heading + commands


GENERATED = {"api/loss": option_tables, "api/trl": config_table, "api/cli": command_options}


def complete_source(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname in ELSEWHERE:
        file = ROOT / ELSEWHERE[docname]
        folder = os.path.relpath(file.parent, HERE)
        source[0] = re.sub(r"\]\((?!\w+:|#)", f"]({folder}/", file.read_text(encoding="utf-8"))
    if docname == app.config.root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])
    if docname in GENERATED:
        source[0] = source[0].replace(".. generated by conf.py", GENERATED[docname]())


class LinksOutOfTheSite(SphinxTransform):
    """Relative links to files outside docs/: to the site's page of the file if it has one, else to the repository."""

    default_priority = 5

    def apply(self, **_: Any) -> None:
        kinds = (addnodes.download_reference, addnodes.pending_xref)
        for node in [node for kind in kinds for node in self.document.findall(kind)]:
            if node.get("reftype") != "myst":
                continue
            target, _, anchor = node["reftarget"].partition("#")
            if node.get("refdomain") == "doc":  # a Markdown file, whose suffix myst has taken off
                target, anchor = f"{target}.md", node["reftargetid"]
            path = Path(os.path.normpath((HERE / self.env.docname).parent / target))
            if not path.is_relative_to(ROOT) or path.is_relative_to(HERE):
                continue
            name = path.relative_to(ROOT).as_posix()
            if not path.exists():
                log.warning("no such file: %s", name, location=node)
            page = next((page for page, file in ELSEWHERE.items() if file == name), None)
            if page is not None:
                where = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{page}", "refexplicit": True}
                node.replace_self(addnodes.pending_xref("", *node.children, refdoc=self.env.docname, **where))
                continue
            uri = f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{name}" + (f"#{anchor}" if anchor else "")
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


# ------------------------------------------------------------------------------------------------------- docstrings


def option_sections(app: Sphinx, what: str, name: str, obj: Any, _: Any, lines: list[str]) -> None:
    """Sections of a docstring that napoleon does not know, such as "Options of ``sampled``": a list with a heading.

    Pages that a docstring names are links.
    """
    lines[:] = [line for part in _sections(lines) for line in part]
    lines[:] = [re.sub(r"(`*)\bdocs/([\w./-]+)\.md\1", r":doc:`/\2`", line) for line in lines]


def _sections(lines: list[str]) -> Iterator[list[str]]:
    inside = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"(?:More options|Options of .*):$", line) and following.startswith("    "):
            inside = True
            yield [f".. rubric:: {line.removesuffix(':')}", ""]
        elif inside and line and not line.startswith(" "):
            inside = False
            yield [line]
        elif inside and (found := re.match(r"    (\w[\w, ]*): (.*)", line)):
            yield [f"**{found[1]}**", f"    {found[2]}"]
        else:
            yield [line[4:] if inside else line]


def dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Between a parameter and its text, which smartquotes would make, and of options too."""
    for text in list(doctree.findall(nodes.Text)):
        if text.startswith(" -- "):
            text.parent.replace(text, nodes.Text(" –" + text[3:]))


# ---------------------------------------------------------------------------------------------------------- the end


def every_public_name(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.get_domain("py").objects  # type: ignore[attr-defined]
    with mock(app.config.autodoc_mock_imports):
        public = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    for name in public:
        if name not in documented:
            log.warning("the API reference lacks %s", name)


def language_of_page(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename.endswith(".zh"):
        context["language"] = "zh"


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete_source)
    app.add_transform(LinksOutOfTheSite)
    app.connect("autodoc-process-docstring", option_sections, priority=400)
    app.connect("doctree-read", dashes)
    app.connect("env-check-consistency", every_public_name)
    app.connect("html-page-context", language_of_page)
