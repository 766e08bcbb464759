"""The `maskmill` command: finds the job and hands it the rest of the line."""

import difflib
import importlib
import sys
from collections.abc import Sequence

import pipeline
from pipeline.errors import EXIT_CONFIG

__all__ = ["main"]

JOBS = {
    "label": "label a corpus into a table of masks",
    "train": "train a model, on any number of workers, and go on where it stopped",
    "evaluate": "score predictions against targets into a table of scores",
    "report": "fold scores into figures, tables and a page",
    "compare": "two runs over the same images: what differs, and whether it is more than chance",
    "status": "expected = ok + failed + pending, and the kinds of failure",
    "export": "the labels for other tools: COCO, VOC, YOLO, CVAT, Label Studio and more; review packs",
    "import": "corrections from other tools back as targets",
    "compact": "few large files of many small ones, with the same rows",
    "preview": "one PNG of images with their masks",
    "view": "a page on this machine to browse a table: images under their masks",
    "pack": "write any source as tar shards",
    "models": "list the models of the registry",
    "preflight": "what a run would meet, on a sample, before it starts",
    "tune": "the fastest setting of a model whose labels stay within a tolerance of those in fp32",
    "bench": "how fast labelling is beside its limit and beside other tools, in one run",
    "submit": "send any of these to a Ray cluster",
    "drain": "stop a cluster's jobs, each with its commit or checkpoint, before the cluster goes",
    "infra": "manifests of a cluster: KubeRay, AWS, GCP",
}


# Modules that cannot have the name of their job, which is a word of the language.
MODULES = {"import": "import_"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else EXIT_CONFIG
    if arguments[0] in ("-V", "--version"):
        print(f"maskmill {pipeline.__version__}")
        return 0
    job = arguments[0]
    if job not in JOBS:
        close = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"jobs: {', '.join(JOBS)}"
        print(f"maskmill: error: unknown job {job!r}; {hint}", file=sys.stderr)
        return EXIT_CONFIG
    code: int = importlib.import_module(f"jobs.{MODULES.get(job, job)}").main(arguments[1:])
    return code


def usage() -> str:
    """What `maskmill --help` prints."""
    lines = ["usage: maskmill JOB ...", "", "Jobs (maskmill JOB --help explains each):"]
    lines += [f"  {job:<10}{text}" for job, text in JOBS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
