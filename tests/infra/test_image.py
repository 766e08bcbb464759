"""The Dockerfile: what it copies is there and reaches the builder, versions are pinned, nothing runs as root."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline import __version__

REPOSITORY = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order; continued lines are one."""
    text = (REPOSITORY / "infra" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository's root into the build; the last pattern that fits decides."""
    kept = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            negated, pattern = pattern.startswith("!"), pattern.lstrip("!")
            if pattern == "*" or fnmatchcase(path, pattern) or path.startswith(f"{pattern}/"):
                kept = negated
    return kept


def test_what_is_copied_is_there_and_is_sent() -> None:
    copied = [arguments.split() for name, arguments in instructions() if name == "COPY" and "--from" not in arguments]
    sources = {source for words in copied for source in words[:-1]}
    assert {"constraints.txt", "pyproject.toml", "pipeline", "jobs"} <= sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert sent(source), source
    # setuptools reads these while it builds.
    assert {"README.md", "LICENSE"} <= sources


@pytest.mark.parametrize("path", [".git", "out", "shared", "tests", ".venv", "configs", ".env", "infra"])
def test_nothing_else_reaches_the_builder(path: str) -> None:
    assert not sent(path)


def test_both_variants_have_a_stage() -> None:
    stages = [arguments.rpartition(" AS ")[2] for name, arguments in instructions() if name == "FROM"]
    assert {"torch-cuda", "torch-cpu"} <= set(stages)
    assert "FROM torch-${VARIANT} AS install" in (REPOSITORY / "infra" / "Dockerfile").read_text()


def test_base_and_packages_are_pinned() -> None:
    (base,) = [value for name, value in instructions() if name == "ARG" and value.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-[a-z]+", base)
    for name, arguments in instructions():
        for command in re.findall(r"pip install [^&|]*", arguments) if name == "RUN" else ():
            assert "--constraint /build/constraints.txt" in command
    pins = {
        canonicalize_name(Requirement(line).name)
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = [value for name, value in instructions() if name == "ARG" and value.startswith("EXTRAS=")]
    wanted = [*project["dependencies"]]
    for extra in extras.removeprefix("EXTRAS=").split(","):
        wanted += project["optional-dependencies"][extra]
    assert {canonicalize_name(Requirement(item).name) for item in wanted} <= pins


def test_it_runs_as_the_user_that_the_pods_name() -> None:
    last = max(index for index, (name, _) in enumerate(instructions()) if name == "FROM")
    final = instructions()[last:]
    assert [arguments for name, arguments in final if name == "USER"] == ["1000:1000"]
    assert final[-2][0] == "USER"
    group = (REPOSITORY / "infra" / "kuberay" / "_group.yaml.j2").read_text()
    assert "runAsUser: 1000" in group
    home = re.search(r"HOME=(\S+)", " ".join(arguments for _, arguments in final))
    assert home is not None
    assert f"mountPath: {home[1]}," in group


def test_versions_in_defaults_are_this_one() -> None:
    for path in ("pipeline/config_infra.py", "configs/cluster/cluster.yaml", "infra/Dockerfile"):
        found = re.findall(r"maskmill[:-](\d+\.\d+\.\d+)", (REPOSITORY / path).read_text())
        assert set(found) == {__version__}, path
