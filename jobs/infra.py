"""Manifests of a cluster from values: `maskmill infra [VALUES.yaml] [key=value ...] --out DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from jobs.common import config_help, guarded
from jobs.submit import CONFIGS
from pipeline.config_infra import InfraConfig
from pipeline.configfile import load_config, redacted
from pipeline.errors import ConfigError
from pipeline.infra import TEMPLATES, render

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        "maskmill infra",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="write the manifests of a cluster: KubeRay, Ray's launcher on AWS and GCP, IAM policies",
        epilog=config_help("infra", InfraConfig).partition("\n\n")[2],
    )
    parser.add_argument("values", nargs="*", help="VALUES.yaml [dotted.key=value ...]")
    parser.add_argument("--out", type=Path, required=True, help="folder that they are written into")
    parser.add_argument("--templates", type=Path, default=TEMPLATES, help="default: infra/ of maskmill's repository")
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: _infra(arguments))


def _infra(arguments: argparse.Namespace) -> int:
    given = list(arguments.values)
    uri = given.pop(0) if given and "=" not in given[0] else None
    values = load_config(InfraConfig, uri, given)
    files = render(values, {job: _job_config(job, where) for job, where in values.jobs.items()}, arguments.templates)
    for path, text in files.items():
        target = arguments.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(target)
    return 0


def _job_config(job: str, uri: str) -> str:
    """A job's config, checked as the job itself would, as YAML. Raises ConfigError, also for credentials in it."""
    config = load_config(CONFIGS[job], uri)
    tree = config.model_dump(mode="json", exclude_unset=True)
    if redacted(config) != config.model_dump(mode="json"):
        raise ConfigError(
            f"{uri} (jobs.{job}) holds credentials, which a ConfigMap must not; give the pods an identity "
            "(kubernetes.service_account_annotations) or a Secret (kubernetes.env_from_secrets)"
        )
    output = tree.get("output", {}).get("uri")
    if output is not None and "://" not in output and not output.startswith("/"):
        raise ConfigError(
            f"{uri} (jobs.{job}): output.uri must be a URI or an absolute path that all nodes share, got {output!r}"
        )
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    sys.exit(main())
