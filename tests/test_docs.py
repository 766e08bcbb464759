"""The documentation as a site and as files: it builds, no link is broken, and commands that are not run are right.

The commands of the guide and of the jobs' pages are run in tests/jobs/test_docs.py.
"""

import importlib
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from docs_helpers import Shell, blocks, commands, differing, headings

from jobs import cli, common, preflight
from pipeline.config import LabelConfig
from pipeline.dataflow import submission

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *(REPOSITORY / name for name in ("SECURITY.md", "CHANGELOG.md")), *REPOSITORY.glob("infra/*.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# A config that a page names and does not show, so that what the page sets in it can be checked.
NAMED = {
    "label": {"source": {"format": "scenes"}, "models": [{"name": "unet_small"}], "output": {"uri": "s3://b/labels"}},
    "train": {"source": {"format": "scenes"}, "model": {"name": "unet_small"}, "epochs": 1, "output": {"uri": "s3://b/m"}},
    "pack": {"source": {"format": "scenes"}, "output": {"uri": "s3://b/shards"}},
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_between_files_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        path, _, anchor = unquote(target).partition("#")
        if urlsplit(target).scheme:
            continue
        there = (page.parent / path).resolve() if path else page
        mkdocs_only = anchor.startswith("pipeline.")  # made of docstrings; the site's test follows it
        if not there.exists() or (anchor and not mkdocs_only and anchor not in headings(there)):
            broken.append(target)
    assert not broken


def test_every_job_has_a_page_with_its_command() -> None:
    shown = set()
    for page in (REPOSITORY / "docs").rglob("*.md"):
        for block in blocks(page):
            shown |= set(re.findall(r"^(?:\$ )?maskmill (\w+)", "\n".join(block.lines), re.MULTILINE))
    assert set(cli.JOBS) <= shown


def said_commands() -> Iterator[tuple[str, list[str]]]:
    """What pages outside of the guide say to type: each maskmill command's words, and where it stands."""
    for page in [README, *sorted((REPOSITORY / "docs").glob("*.md"))]:
        if page.name == "guide.md":
            continue
        for block in blocks(page):
            if block.kind not in ("", "sh"):
                continue
            for command, _ in commands(block):
                words = shlex.split(command, comments=True)
                if words[:1] == ["maskmill"] and ">" not in words:
                    yield block.where, words[1:]
                elif "jobs." in command and words[:3] in (["ray", "job", "submit"], ["python", "-m", words[2:3]]):
                    at = next(n for n, word in enumerate(words) if word.startswith("jobs."))
                    yield block.where, [words[at].removeprefix("jobs."), *words[at + 1 :]]


SAID = list(said_commands())


def test_the_readme_has_commands() -> None:
    jobs = {words[0] for where, words in SAID if where.startswith("README")}
    assert {"label", "status", "preview", "report", "evaluate", "compare", "train", "preflight", "submit"} <= jobs


@pytest.mark.parametrize(("where", "words"), SAID, ids=[f"{where} {' '.join(words)[:40]}" for where, words in SAID])
def test_a_command_is_understood(
    where: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real parser, and where it sets fields of a config by that config's own checks; nothing is done."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("configs").symlink_to(REPOSITORY / "configs")
    shown = {block.lines[0][2:]: block for block in blocks(README) if block.kind == "yaml"}
    job, *arguments = words
    module = importlib.import_module(f"jobs.{cli.MODULES.get(job, job)}")
    for argument in arguments:
        if not argument.endswith((".yaml", ".yml")) or "=" in argument or Path(argument).exists():
            continue
        asked = next((name for name in (job, *arguments) if name in NAMED), "label")
        block = shown.get(argument)
        text = "\n".join(block.lines) if block else yaml.safe_dump(NAMED[asked])
        Path(argument).write_text(text, encoding="utf-8")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    for name, answer in {
        "connect": None,
        "send": "id",
        "follow": None,
        "exit_code": 0,
        "status": "",
        "stop": True,
    }.items():
        monkeypatch.setattr(submission, name, lambda *_, answer=answer: answer)
    if hasattr(module, "config_job"):
        monkeypatch.setattr(
            module, "config_job", lambda job, kind, body, argv: common.config_job(job, kind, lambda _: 0, argv)
        )
    elif job == "preflight":
        monkeypatch.setattr(
            preflight, "_preflight", lambda given: bool(preflight._config(given.config, given.overrides)) - 1
        )
    elif job not in ("submit", "infra"):
        monkeypatch.setattr(module, "guarded", lambda body: 0)
    try:
        code = module.main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 0, f"{where}: {capsys.readouterr().err}"


def test_the_readmes_config_is_one() -> None:
    found = [yaml.safe_load("\n".join(block.lines)) for block in blocks(README) if block.kind == "yaml"]
    assert found
    for config in found:
        LabelConfig.model_validate(config)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a  1", "b 0.5"], "a 1\nb 17.25\n", True),
        (["24 rows in 3 s"], "24 rows in 1 min 05 s\n", True),
        (["24 rows in 3 s"], "25 rows in 3 s\n", False),
        (["run 20261122T042728-a464fe: done"], "run 20270101T000000-000000: done\n", True),
        (["run 20261122T042728-a464fe: done"], "run 20270101T000000-000000: stopped\n", False),
        (["first", "..."], "first\nsecond\nthird\n", True),
        (["first", "...", "third"], "first\nthird\n", True),
        (["first", "third"], "first\nsecond\nthird\n", False),
        (["second", "first"], "first\nsecond\n", False),
        (["first"], "first\nsecond\n", False),
        (["about ...; done"], "about 3 of 4; done\n", True),
        (["8 of 8 (ok)"], "8 of 8 (OK)\n", False),
    ],
)
def test_what_is_shown_is_held_against_what_was_printed(shown: list[str], printed: str, same: bool) -> None:
    assert (not differing(shown, printed)) == same


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```console\n$ maskmill --version\nmaskmill ...\n```", ""),
        ("```console\n$ maskmill --version\nmaskmill nought\n```", "not printed"),
        ("```console\n$ maskmill labl\n```", "exit code 2"),
        ("```console\n$ maskmill labl\n...\n$ echo $?\n2\n```", ""),
        ("```console\n$ maskmill labl\n...\n$ echo $?\n0\n```", "not printed"),
        ("```console\n$ maskmill labl\n...\n```", "the last command ended with 2"),
        ("```console\n$ maskmill labl\n...\n$ maskmill --version\n```", "show `echo $?`"),
        ("```console\n$ rm file\n```", "only maskmill is run"),
        ("```sh\nmaskmill label mine.yaml\n```", "nor on the list of exceptions"),
        ("```sh\nkubectl get pods\n```", ""),
        ("```text\nmaskmill label mine.yaml\n```", "a command in a block of words"),
        ("```\nmaskmill label mine.yaml\n```", "expected a block of console"),
        ("```python\nprint(1 + 1)\n```\n\n```text\n2\n```", ""),
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```", "not printed"),
        ('```yaml title="a.yaml"\nb: 1\n```\n\n```python\nprint(open("a.yaml").read())\n```\n\n```text\nb: 1\n```', ""),
    ],
)  # fmt: skip
def test_a_page_that_is_wrong_is_found_out(page: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    found = list(Shell(tmp_path).page(path, {"kubectl ": "needs a cluster"}))
    assert (problem in found[0]) if problem else not found


class Page(HTMLParser):
    """What a page refers to, its own anchors, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])


def test_the_site_builds_and_holds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strictly, so that what mkdocs warns of ends it; nothing that a page shows comes from another host."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    pages = {path: Page(path.read_text("utf-8")) for path in tmp_path.rglob("*.html")}
    broken: dict[str, list[str]] = defaultdict(list)
    for path, page in pages.items():
        name = path.relative_to(tmp_path).as_posix()
        if name == "404.html":
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                if link in page.loads and parts.scheme != "data":
                    broken[name].append(f"from another host: {link}")
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].anchors | {"__skip"}):
                broken[name].append(link)
    assert not broken
    label = (tmp_path / "jobs" / "label.html").read_text("utf-8")
    for field in ("source.uri", "models.N.weights", "resources.batch_pixels", "failure_budget"):
        assert f"<code>{field}</code>" in label
    assert "usage: maskmill report" in (tmp_path / "jobs" / "report.html").read_text("utf-8")
    assert 'id="pipeline.masks.decode_label_map"' in (tmp_path / "api" / "table.html").read_text("utf-8")
