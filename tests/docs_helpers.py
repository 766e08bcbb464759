"""Pages of the documentation as what they promise: files, commands and what these print.

In a page of the guide and of a job a block is one of

    ```yaml title="NAME"    a file of that name, written where the commands run; without a title, an example
    ```console              `$ command` lines, each with what it prints; these are run
    ```python               run; a ```text block right after it is what it prints
    ```sh                   commands that a test cannot run, each on a list of exceptions with its reason
    ```text                 words, no commands

`...` alone stands for lines that are left out, within a line for a part of it. What differs between two runs or
machines (fractions, times, versions, ids of runs, what held a run up, verdicts) is compared by its kind; whole numbers
must be right.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Block", "Shell", "blocks", "commands", "differing", "headings"]

FENCE = re.compile(r"^( *)```(\w*) *(.*)$")
TITLE = re.compile(r'title="([^"]+)"')
KINDS = ("console", "json", "python", "sh", "text", "yaml")

# In this order: what is longer first.
VARYING = [
    (re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}"), "RUN"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([+-]\d\d:\d\d|Z)?"), "TIME"),
    (re.compile(r"\b[0-9a-f]{16}(\.[0-9a-f]{8})?\b|\b(?=\d*[a-f])[0-9a-f]{8}\b"), "VERSION"),
    (re.compile(r"^\w+-bound: .*"), "BOUND"),
    (re.compile("▲ better|▼ worse|· unclear"), "VERDICT"),
    (re.compile(r"(?<![.\d])((\d+ h )?(\d+ min )?\d+ s|\d+ h \d+ min)\b"), "DURATION"),
    (re.compile("[+\N{MINUS SIGN}-]?" r"\b\d[\d,]*\.\d+\b"), "FRACTION"),
    (re.compile(r"\b\d+ ?%"), "SHARE"),
]


@dataclass(frozen=True)
class Block:
    """A fenced block. where: page and line. lines: without what the fence itself is indented by."""

    kind: str
    title: str
    lines: tuple[str, ...]
    where: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for one that does not end."""
    fence: re.Match[str] | None = None
    start, kept = 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = FENCE.match(line)
        if fence is None and found:
            fence, start, kept = found, number, []
        elif fence is not None and line.strip() == "```":
            title = TITLE.search(fence[3])
            yield Block(fence[2], title[1] if title else "", tuple(kept), f"{page.name}:{start}")
            fence = None
        elif fence is not None:
            kept.append(line[len(fence[1]) :])
    if fence is not None:
        raise ValueError(f"{page}:{start}: this block does not end")


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings have, on the site as on a repository's host."""
    found, fenced = set(), False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("#") and not fenced:
            words = re.sub(r"[^\w\s-]", "", line.lstrip("#").strip().lower())
            found.add(re.sub(r"\s", "-", words))
    return found


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines shown after it; of other blocks each line, with none."""
    command, shown, open_line = "", [], False
    for line in block.lines:
        if open_line or block.kind != "console" or line.startswith("$ "):
            text = line.removeprefix("$ ") if block.kind == "console" else line
            if not open_line:
                if command:
                    yield command, shown
                command, shown = "", []
            open_line = text.endswith("\\")
            command += text.removesuffix("\\").strip() + " " * open_line
        else:
            if not command:
                raise ValueError(f"{block.where}: expected a line with `$ ` first, got {line!r}")
            shown.append(line)
    if command:
        yield command, shown


def differing(shown: list[str], printed: str) -> str:
    """What keeps the shown lines from being what was printed; empty where they are."""
    wanted = [_plain(line) for line in shown]
    there = [_plain(line) for line in printed.splitlines()]
    while there and not there[-1]:
        there.pop()
    pattern = "".join(_pattern(line) for line in wanted)
    if re.fullmatch(pattern, "".join(f"{line}\n" for line in there)):
        return ""
    missing = [line for line in wanted if line != "..." and not any(re.fullmatch(_inner(line), own) for own in there)]
    return f"not printed: {missing or 'these lines in this order'}\nprinted:\n{printed}"


def _pattern(line: str) -> str:
    return r"(?:.*\n)*?" if line == "..." else _inner(line) + r"\n"


def _inner(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("..."))


def _plain(line: str) -> str:
    for pattern, name in VARYING:
        line = pattern.sub(name, line)
    return " ".join(line.split())


@dataclass
class Shell:
    """Where the commands of pages run: this process, in one folder.

    scope: the names of Python blocks. code: the exit code of the last command, until it is asked for. problems: what
    was wrong with the page that made what the others go on with.
    """

    folder: Path
    scope: dict[str, Any] = field(default_factory=dict)
    code: int = 0
    problems: list[str] = field(default_factory=list)

    def page(self, page: Path, exceptions: Mapping[str, str]) -> Iterator[str]:
        """Do what a page says; gives what is wrong with it. exceptions: beginnings of commands that are not run."""
        said: str | None = None
        for block in blocks(page):
            for problem in self._block(block, exceptions, said):
                yield f"{block.where}: {problem}"
            said = self._said if block.kind == "python" else None
        if self.code:
            yield f"{page.name}: the last command ended with {self.code}, and the page does not show it"

    def _block(self, block: Block, exceptions: Mapping[str, str], said: str | None) -> Iterator[str]:
        if block.kind not in KINDS:
            yield f"expected a block of {', '.join(KINDS)}, got {block.kind or 'none'}"
        elif block.kind == "yaml" and block.title:
            self.folder.joinpath(block.title).write_text("\n".join((*block.lines, "")), encoding="utf-8")
        elif block.kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
                exec(compile("\n".join(block.lines), block.where, "exec"), self.scope)
            self._said = printed.getvalue()
        elif block.kind == "text" and said is not None:
            if problem := differing(list(block.lines), said):
                yield problem
        elif block.kind in ("text", "json"):
            yield from (f"a command in a block of words: {line}" for line in block.lines if _is_command(line))
        elif block.kind == "sh":
            for command, _ in commands(block):
                if command and not command.startswith("#") and not command.startswith(tuple(exceptions)):
                    yield f"neither run nor on the list of exceptions: {command}"
        elif block.kind == "console":
            for command, shown in commands(block):
                yield from self._command(command, shown)

    def _command(self, command: str, shown: list[str]) -> Iterator[str]:
        words = shlex.split(command.replace("$PWD", str(self.folder)), comments=True)
        if words == ["echo", "$?"]:
            printed, self.code = f"{self.code}\n", 0
        elif self.code:
            yield f"{command}: the command before ended with {self.code}; show `echo $?` or correct it"
            self.code = 0
            return
        elif words[0] == "maskmill":
            printed = self.maskmill(words[1:])
        else:
            yield f"only maskmill is run, got {command}; an sh block holds what is not"
            return
        if shown and (problem := differing(shown, printed)):
            yield f"{command}\n{problem}"
        elif not shown and self.code:
            yield f"{command}: exit code {self.code}\n{printed}"

    def maskmill(self, words: list[str]) -> str:
        """Run the command in this process; what a terminal would show of it. Its exit code is kept."""
        main = importlib.import_module("jobs.cli").main
        terminal = io.StringIO()
        with (
            contextlib.redirect_stdout(terminal),
            contextlib.redirect_stderr(terminal),
            contextlib.chdir(self.folder),
        ):
            try:
                self.code = main(words)
            except SystemExit as ended:
                self.code = int(ended.code or 0)
        if transcript := os.environ.get("MASKMILL_DOCS_TRANSCRIPT"):
            with Path(transcript).open("a", encoding="utf-8") as file:
                file.write(
                    f"$ maskmill {shlex.join(words)}\n{terminal.getvalue()}[{self.code}] {time.process_time():.1f}\n\n"
                )
        return terminal.getvalue()


def _is_command(line: str) -> bool:
    return line.removeprefix("$ ").startswith(("maskmill ", "make ", "pip ", "ray ", "kubectl ", "docker "))
