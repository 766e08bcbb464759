"""Manifests that `maskmill infra` writes: right by the real schemas, and saying what they must."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs import infra as job
from pipeline.config import EvaluateConfig, LabelConfig, PackConfig
from pipeline.config_infra import InfraConfig
from pipeline.config_train import TrainConfig
from pipeline.configfile import load_config
from pipeline.errors import EXIT_CONFIG, ConfigError
from pipeline.infra import SPOT, render

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = REPOSITORY / "configs" / "cluster" / "cluster.yaml"
EXAMPLE = REPOSITORY / "infra" / "example"
SCHEMAS = json.loads((Path(__file__).parent / "schemas" / "custom_resources.json").read_text())
KUBERNETES = kubernetes_validate.latest_version()
GIB = 2**30


def values(**fields: Any) -> InfraConfig:
    return InfraConfig.model_validate(fields)


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def resource(files: dict[str, str], kind: str, path: str | None = None) -> dict[str, Any]:
    (found,) = [
        document
        for name, text in files.items()
        if name.endswith(".yaml") and name.startswith("kuberay/") and path in (None, name)
        for document in documents(text)
        if document["kind"] == kind
    ]
    return found


def check(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError or kubernetes_validate.ValidationError."""
    schema = SCHEMAS["kinds"].get(f"{document['apiVersion']} {document['kind']}")
    if schema is None:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    else:
        jsonschema.Draft202012Validator({**schema, "$defs": SCHEMAS["$defs"]}).validate(document)


def pods(files: dict[str, str]) -> list[dict[str, Any]]:
    """Pod specs of every RayCluster and RayJob."""
    found = []
    for path, text in files.items():
        for document in documents(text) if path.startswith("kuberay/") else ():
            spec = document.get("spec", {})
            cluster = spec.get("rayClusterSpec", spec)
            if "headGroupSpec" in cluster:
                groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
                found += [group["template"]["spec"] for group in groups]
            if "submitterPodTemplate" in spec:
                found.append(spec["submitterPodTemplate"]["spec"])
    return found


EVERYTHING = {
    "head": {"cpus": 2, "memory_gib": 8},
    "gpu": {"max": 16, "gpus": 8, "min": 2, "taints": ["nvidia.com/gpu", "team"], "spot": False},
    "cpu": {"max": 3, "node_labels": {"node.kubernetes.io/instance-type": "c7i.2xlarge"}},
    "env": {"AWS_REGION": 'us-"west"-2', "NOTE": "a: b # c"},
    "kubernetes": {
        "spot_platform": "gke",
        "image_pull_secret": "pull",
        "env_from_secrets": ["maskmill-s3", "hf"],
        "service_account_annotations": {"iam.gke.io/gcp-service-account": "m@p.iam.gserviceaccount.com"},
        "redis": {"address": "rediss://redis:6379", "password_secret": "redis", "password_key": "word"},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "cpus alone": {"gpu": {"max": 0}, "kubernetes": {"network_policy": False}},
    "gpus alone": {"cpu": {"max": 0}},
    **{platform: {"kubernetes": {"spot_platform": platform}} for platform in SPOT},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_manifests_fit_the_schemas(fields: dict[str, Any]) -> None:
    files = render(values(**fields), {"label": "models: []\n", "train": "epochs: 1\n"})
    checked = [document["kind"] for path in files if path.startswith("kuberay/") for document in documents(files[path])]
    for path in files:
        for document in documents(files[path]) if path.startswith("kuberay/") else ():
            check(document)
    assert sorted(set(checked) - {"NetworkPolicy"}) == [
        "ConfigMap",
        "PodMonitor",
        "RayCluster",
        "RayJob",
        "ServiceAccount",
    ]
    assert ("NetworkPolicy" in checked) == fields.get("kubernetes", {}).get("network_policy", True)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "gcsFaultToleranceOptions"), {"redisAdress": "redis:6379"}),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "one"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "livenesProbe"), {}),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "lots"),
        (("spec", "headGroupSpec", "template", "spec", "securityContext", "runAsUser"), "root"),
    ],
)
def test_the_schema_refuses_what_is_wrong(where: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(resource(render(values(), {}), "RayCluster"))
    check(document)
    place: Any = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_the_example_is_what_its_values_make(tmp_path: Path) -> None:
    """So that a change of a template shows what it does. `maskmill infra configs/cluster/cluster.yaml --out
    infra/example` writes it anew."""
    assert job.main([str(VALUES), "--out", str(tmp_path)]) == 0

    def tree(folder: Path) -> dict[str, str]:
        return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.*"))}

    assert tree(tmp_path) == tree(EXAMPLE)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("name", "kind"), [("label", LabelConfig), ("train", TrainConfig), ("evaluate", EvaluateConfig)]
)
def test_a_jobs_config_arrives_whole(name: str, kind: type, tmp_path: Path) -> None:
    example = {path.name: path.read_text() for path in (EXAMPLE / "kuberay").iterdir()}
    text = documents(example[f"rayjob-{name}.yaml"])[0]["data"]["config.yaml"]
    arrived = tmp_path / "config.yaml"
    arrived.write_text(text)
    assert load_config(kind, str(arrived)) == load_config(kind, f"configs/cluster/{name}.yaml")
    spec = documents(example[f"rayjob-{name}.yaml"])[1]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "job"]
    assert spec["entrypoint"] == f"python -m jobs.{name} {mount['mountPath']}/config.yaml"
    assert {"name": "job", "configMap": {"name": f"maskmill-{name}"}} in head["volumes"]


def test_a_job_starts_with_all_of_the_workers_that_it_is_for() -> None:
    files = render(values(cpu={"max": 3}, gpu={"max": 5, "min": 1}), {"label": "", "evaluate": ""})

    def replicas(kind: str, path: str) -> dict[str, tuple[int, int, int]]:
        spec = resource(files, kind, path)["spec"]
        groups = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
        return {g["groupName"]: (g["minReplicas"], g["replicas"], g["maxReplicas"]) for g in groups}

    assert replicas("RayCluster", "kuberay/raycluster.yaml") == {"cpu": (0, 0, 3), "gpu": (1, 1, 5)}
    assert replicas("RayJob", "kuberay/rayjob-label.yaml") == {"cpu": (0, 0, 3), "gpu": (1, 5, 5)}
    assert replicas("RayJob", "kuberay/rayjob-evaluate.yaml") == {"cpu": (0, 3, 3), "gpu": (1, 1, 5)}


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_pods_have_no_rights_that_they_do_not_need(fields: dict[str, Any]) -> None:
    found = pods(render(values(**fields), {"label": ""}))
    assert len(found) == 3 + 3 + 1
    for pod in found:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            # With a root that cannot be written, what Ray and caches write needs volumes.
            assert {"/tmp", "/home/maskmill"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
    cluster = resource(render(values(**fields), {}), "RayCluster")["spec"]
    token = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert token in {mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert token not in {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert cluster["authOptions"]["mode"] == "token"


@pytest.mark.parametrize(
    ("memory_gib", "share"), [(1, 0.05), (2, 0.6), (7, 0.333), (32, 0.25), (2000, 0.05), (1999, 0.6)]
)
def test_shared_memory_holds_the_object_store(memory_gib: int, share: float) -> None:
    group = {"max": 1, "memory_gib": memory_gib, "object_store_share": share}
    spec = resource(render(values(gpu=group, cpu={"max": 0}), {}), "RayCluster")["spec"]["workerGroupSpecs"][0]
    store = int(spec["rayStartParams"]["object-store-memory"])
    (volume,) = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "shared-memory"]
    limit = volume["emptyDir"]["sizeLimit"]
    assert limit.endswith("Mi")
    assert volume["emptyDir"]["medium"] == "Memory"
    assert max(75_000_000, 0.95 * share * memory_gib * GIB - GIB / 512) <= store < int(limit[:-2]) * 2**20
    assert int(limit[:-2]) * 2**20 < memory_gib * GIB


def test_a_job_that_is_stopped_has_the_time_that_values_give_it() -> None:
    cluster = resource(render(values(stop_grace_s=200), {}), "RayCluster")["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    command = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "jobs.drain"]
    assert command[-2:] == ["--timeout-s", "200"]
    for pod in (head, *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])):
        # SIGTERM comes after preStop, and both count.
        assert pod["terminationGracePeriodSeconds"] > 200
        variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "200"
    for group in cluster["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "200"]


@pytest.mark.parametrize("platform", SPOT)
def test_spot_nodes_take_workers_and_never_the_head(platform: str) -> None:
    key, value = SPOT[platform]
    cluster = resource(render(values(kubernetes={"spot_platform": platform}, cpu={"spot": False}), {}), "RayCluster")[
        "spec"
    ]
    head, cpu, gpu = (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    never = {"key": key, "operator": "NotIn", "values": [value]}
    for pod in (head, cpu):
        (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"] == [never]
        assert "tolerations" not in pod
    (wish,) = gpu["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["preference"]["matchExpressions"] == [{"key": key, "operator": "In", "values": [value]}]
    assert {item["key"] for item in gpu["tolerations"]} == {"nvidia.com/gpu", key}


def test_the_network_policy_covers_every_pod_and_port() -> None:
    files = render(values(name="mill"), {"label": ""})
    policy = resource(files, "NetworkPolicy")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    for kind, path in (("RayCluster", "kuberay/raycluster.yaml"), ("RayJob", "kuberay/rayjob-label.yaml")):
        spec = resource(files, kind, path)["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        templates = [g["template"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        templates += [spec["submitterPodTemplate"]] if kind == "RayJob" else []
        for template in templates:
            assert selector.items() <= template["metadata"]["labels"].items()
    ports = {
        port["name"]: port["containerPort"]
        for port in resource(files, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    scraped = {endpoint["port"] for endpoint in resource(files, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    (opened,) = [
        {port["port"] for port in rule["ports"]} for rule in policy["ingress"] if "monitoring" in json.dumps(rule)
    ]
    assert opened == {ports[name] for name in scraped}


@pytest.mark.parametrize(
    "text",
    ['"', "'", "a: b", "- a #b", "{{ values }}", "${HOME} $(id) `id`", "\\n\\", "null", "0x10", "*a", "é☃", "]}"],
)
def test_no_value_breaks_out_of_its_place(text: str) -> None:
    fields = {"image": text, "env": {"A": text}, "aws": {"head_type": text}}
    files = render(values(**fields), {"label": f"note: {text}\u2028\x85"})
    head = resource(files, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == text
    assert {"name": "A", "value": text} in head["env"]
    assert resource(files, "ConfigMap")["data"]["config.yaml"] == f"note: {text}\u2028\x85"
    aws = documents(files["launcher/aws.yaml"])[0]
    assert aws["available_node_types"]["head"]["node_config"]["InstanceType"] == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Mask Mill"}, "name"),
        ({"gpu": {"min": 5, "max": 2}}, r"gpu: min must be at most max \(2\), got 5"),
        ({"gpu": {"max": 0}, "cpu": {"max": 0}}, "one of cpu.max and gpu.max must be 1 or more"),
        ({"cpu": {"max": 0}, "jobs": {"evaluate": "e.yaml"}}, "cpu.max must be 1 or more for jobs.evaluate"),
        ({"gpus": {}}, "unknown key 'gpus' in the config; did you mean gpu"),
        ({"env": {"A": "x\nrm -rf /"}}, "env.A"),
        ({"env": {"A": "x\u2028y"}}, "env.A"),
        ({"env": {"A B": "x"}}, "env"),
        ({"storage": {"read": ["gs://bucket"]}}, "storage.read.0"),
        ({"jobs": {"pack": "p.yaml"}}, "jobs.pack"),
        ({"wheel": "dist/a b: c.whl"}, "wheel"),
    ],
)
def test_wrong_values_are_refused_in_words(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=message):
        load_config(InfraConfig, str(path))


def test_credentials_do_not_reach_a_configmap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "label.yaml"
    config.write_text(
        "source: {format: webdataset, uri: s3://b/in, storage: {key: me, secret: hunter2}}\n"
        "models: [{name: unet_small}]\noutput: {uri: s3://b/out}\n"
    )
    out = tmp_path / "out"
    assert job.main(["--out", str(out), f"jobs.label={config}"]) == EXIT_CONFIG
    said = capsys.readouterr()
    assert "holds credentials" in said.err
    assert "hunter2" not in said.err + said.out
    assert not out.exists()


def test_an_output_on_one_nodes_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--out", str(tmp_path), "jobs.label=configs/quickstart.yaml"]) == EXIT_CONFIG
    assert "absolute path that all nodes share, got 'out/quickstart/labels'" in capsys.readouterr().err


def test_without_the_repository_it_says_where_templates_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--out", str(tmp_path), "--templates", str(tmp_path)]) == EXIT_CONFIG
    assert "--templates DIR" in capsys.readouterr().err


def test_the_guides_commands_write_the_files_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (REPOSITORY / "docs" / "cluster.md").read_text()
    commands = [
        line.partition("   #")[0].strip() for line in guide.splitlines() if line.lstrip().startswith("maskmill infra ")
    ]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("AMI", "ami-0123456789abcdef0"))[2:]
        if words == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                job.main(words)
            assert "stop_grace_s  (90)" in capsys.readouterr().out
            continue
        assert words[words.index("--out") + 1] == "build/cluster"
        words[words.index("--out") + 1] = str(tmp_path)
        assert job.main(words) == 0
    named = set(re.findall(r"build/cluster/(\S+?\.(?:yaml|json))", guide))
    assert {"kuberay/access.yaml", "kuberay/rayjob-label.yaml", "launcher/aws.yaml"} <= named
    for path in named:
        assert (tmp_path / path).is_file(), path
    for path in re.findall(r"(?:configs|infra)/[\w./-]+\.(?:yaml|json|yml)", guide):
        assert (REPOSITORY / path).is_file(), path


def test_the_other_configs_of_the_example_are_right() -> None:
    load_config(PackConfig, "configs/cluster/pack.yaml")
