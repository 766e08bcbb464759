"""What mkdocs (mkdocs.yml) adds to the pages: fields and usages from the code itself, and pages that lie outside docs/.

A line `<!-- fields: label -->` becomes the tables of that job's config, `<!-- help: report -->` what the job prints for
--help. README.md is the first page; links to files that are no pages become their text.
"""

import contextlib
import importlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jobs import cli
from jobs.submit import CONFIGS
from pipeline.config_export import ImportConfig
from pipeline.config_infra import InfraConfig
from pipeline.configfile import describe

ROOT = Path(__file__).resolve().parent.parent
# Pages that lie in the repository's root, by their place in the site.
ROOT_PAGES = {"index.md": "README.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}
KINDS = {**CONFIGS, "import": ImportConfig, "infra": InfraConfig}
MARK = re.compile(r"^<!-- (fields|help): (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
HELP_COLUMNS = "100"
# What `--help` of infra lists is a table on the page.
FIELDS_FOLLOW = "\n\nFields:"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that the navigation does not name stands at its end, so that none is out of reach."""
    docs = Path(config.docs_dir)
    named = set(_named(config.nav))
    more = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    unnamed: list[Any] = [path for path in more if path not in named]
    if unnamed and config.nav is not None:
        config.nav.append({"More": unnamed})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for place, source in ROOT_PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    source = ROOT_PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = LINK.sub(lambda link: _relinked(link, source, page.file.src_uri), markdown)
    return MARK.sub(lambda mark: {"fields": fields, "help": usage}[mark[1]](mark[2]), markdown)


def fields(job: str) -> str:
    """Tables of a config's fields, one for each of its sections."""
    parts = []
    for section, rows in groupby(describe(KINDS[job]), lambda row: row[0].partition(".")[0]):
        lines = [f"| `{name}` | {_default(default)} | {_cell(meaning)} |" for name, default, meaning in rows]
        parts.append("\n".join([f"### {section}", "", "| field | default | meaning |", "|---|---|---|", *lines]))
    return "\n\n".join(parts)


def usage(job: str) -> str:
    """What `maskmill JOB --help` prints."""
    printed = io.StringIO()
    main = importlib.import_module(f"jobs.{cli.MODULES.get(job, job)}").main
    width = mock.patch.dict(os.environ, {"COLUMNS": HELP_COLUMNS})
    with width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["--help"])
    return f"```text\n{printed.getvalue().partition(FIELDS_FOLLOW)[0].strip()}\n```"


def _named(nav: Any) -> Iterator[str]:
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from _named(item)


def _relinked(link: re.Match[str], source: str, place: str) -> str:
    """A link of the file `source`, as the page at `place` has it."""
    image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    if ":" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
        path += "/README.md"
    pages = {source: place for place, source in ROOT_PAGES.items()}
    there = path.removeprefix("docs/") if path.startswith("docs/") else pages.get(path)
    if there is None:
        return text if (ROOT / path).exists() and not image else link[0]
    return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{anchor})"


def _default(text: str) -> str:
    return "*required*" if text == "required" else f"`{text}`".replace("|", r"\|")


def _cell(text: str) -> str:
    """Words of a description as they are, in a cell of a table; what stands in backticks is code."""
    parts = text.split("`")
    plain = [re.sub(r"([*_<>{}\[\]])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts)]
    return "`".join(plain).replace("|", r"\|").replace("\n", " ")
