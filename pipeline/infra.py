"""Manifests of a cluster, written from values: Jinja templates of `infra/`, each result read back as YAML or JSON.

Templates are text, so that their comments reach the reader of the manifests; every string in them is quoted as JSON.
"""

import functools
import importlib.metadata
import json
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config_infra import GroupValues, InfraConfig, StorageValues
from pipeline.errors import ConfigError

__all__ = ["TEMPLATES", "render"]

TEMPLATES = Path(__file__).resolve().parent.parent / "infra"
MIB = 2**20
# Ray keeps its store on disk where /dev/shm is smaller than the store; its own files there need a little, too.
SHARED_MEMORY_SLACK = 1.1
HEAD_STORE_SHARE = 0.1
# Characters that may stand in JSON's strings but end a line of YAML, or are no text to it.
YAML_BREAKS = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029, 0xFEFF)}
# A safe loader, in C where PyYAML was built with it.
LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Label and value by which each platform marks nodes that it may take back; the key of a taint is the same.
SPOT = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Workers that are alike, as templates want them. sizes: of _sizes; tolerations: keys of taints."""

    name: str
    values: GroupValues
    image: str
    tolerations: tuple[str, ...]
    sizes: Mapping[str, int]


def render(values: InfraConfig, jobs: Mapping[str, str], templates: Path = TEMPLATES) -> dict[str, str]:
    """Text of every manifest by its path below the output folder.

    jobs: a checked config as YAML for each RayJob, by the name of its job. Raises ConfigError where the templates are
    missing: they are in maskmill's repository, not in its wheel.
    """
    if not (templates / "kuberay").is_dir():
        raise ConfigError(f"expected the templates of maskmill's repository in {templates}; give --templates DIR")
    environment = _environment(templates)
    context = _context(values)
    files: dict[str, str] = {}

    def write(path: str, template: str, **more: Any) -> None:
        text = environment.get_template(template).render({**context, "job": None, **more})
        files[path] = text.strip("\n") + "\n"
        _check(path, files[path])

    for name in ("access", "raycluster", "monitor"):
        write(f"kuberay/{name}.yaml", f"kuberay/{name}.yaml.j2")
    for job, config in jobs.items():
        group = "gpu" if values.gpu.max and job != "evaluate" else "cpu"
        write(f"kuberay/rayjob-{job}.yaml", "kuberay/rayjob.yaml.j2", job=job, job_config=config, job_group=group)
    write("launcher/aws.yaml", "launcher/aws.yaml.j2", cloud_package="boto3", extras=_extras(values.extras))
    write(
        "launcher/gcp.yaml",
        "launcher/gcp.yaml.j2",
        cloud_package="google-api-python-client",
        extras=_extras(("gcs", *values.extras)),
    )
    if values.storage.read or values.storage.write:
        write("iam/data-policy.json", "iam/data-policy.json.j2", storage=_storage(values.storage))
    write("iam/launcher-policy.json", "iam/launcher-policy.json.j2")
    return files


@functools.cache
def _environment(templates: Path) -> Environment:
    # What is made is YAML and JSON, not HTML; strings go through tojson.
    environment = Environment(loader=FileSystemLoader(templates), undefined=StrictUndefined)  # noqa: S701
    environment.filters["tojson"] = _json
    return environment


def _json(value: Any) -> str:
    """JSON that YAML reads as the same: Jinja's own would write < and > as HTML wants them."""
    return json.dumps(value, ensure_ascii=False).translate(YAML_BREAKS)


def _context(values: InfraConfig) -> dict[str, Any]:
    platform = values.kubernetes.spot_platform
    spot = None if platform == "none" else dict(zip(("key", "value"), SPOT[platform], strict=True))
    groups = []
    for name, group, image in (
        ("cpu", values.cpu, values.cpu_image or values.image),
        ("gpu", values.gpu, values.image),
    ):
        if group.max:
            tolerations = [*getattr(group, "taints", ()), *([spot["key"]] if spot and group.spot else [])]
            sizes = _sizes(group.memory_gib, group.object_store_share)
            groups.append(Group(name=name, values=group, image=image, tolerations=tuple(tolerations), sizes=sizes))
    return {
        "values": values,
        "ray_version": importlib.metadata.version("ray"),
        "spot": spot,
        "groups": groups,
        "head_sizes": _sizes(values.head.memory_gib, HEAD_STORE_SHARE),
        "wheel_name": posixpath.basename(values.wheel),
        "exports": " ".join(_assignments(values)),
    }


def _sizes(memory_gib: int, share: float) -> dict[str, int]:
    """Bytes of the object store, and the MiB of /dev/shm that hold it."""
    store_mib = max(80, int(memory_gib * 1024 * share))
    return {"object_store_bytes": store_mib * MIB, "shared_memory_mib": int(store_mib * SHARED_MEMORY_SLACK)}


def _assignments(values: InfraConfig) -> list[str]:
    """Environment of the launcher's nodes, as a shell takes it in front of a command."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_JOB_STOP_WAIT_TIME_S": str(values.stop_grace_s), **values.env}
    return [f"{name}={shlex.quote(value)}" for name, value in variables.items()]


def _extras(extras: Sequence[str]) -> str:
    return f"[{','.join(dict.fromkeys(extras))}]" if extras else ""


def _storage(storage: StorageValues) -> dict[str, Any]:
    """ARNs of what is read and written, and by bucket the prefixes that are listed."""
    listed: dict[str, list[str]] = {}
    arns: dict[str, list[str]] = {"read": [], "write": []}
    for kind, uris in (("read", storage.read), ("write", storage.write)):
        for uri in uris:
            bucket, _, prefix = uri.removeprefix("s3://").partition("/")
            prefix = prefix.rstrip("/")
            arns[kind].append(f"arn:aws:s3:::{bucket}/{f'{prefix}/' if prefix else ''}*")
            # The folder itself is listed with and without its slash; what merely begins alike is not.
            listed.setdefault(bucket, []).extend([prefix, f"{prefix}/*"] if prefix else [""])
    return {"listed": {bucket: list(dict.fromkeys(found)) for bucket, found in listed.items()}, **arns}


def _check(path: str, text: str) -> None:
    """A value must not have broken the document: it is read back."""
    try:
        json.loads(text) if path.endswith(".json") else list(yaml.load_all(text, LOADER))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} would not be readable: {' '.join(str(error).split())}") from error
