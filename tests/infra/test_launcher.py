"""The launcher's files: right by Ray's schema, started by Ray's own code on a fake EC2, with rights that suffice."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.config_infra import InfraConfig
from pipeline.infra import render

REPOSITORY = Path(__file__).resolve().parents[2]
TRUST = REPOSITORY / "infra" / "iam" / "trust-policy.json"


def rendered(**fields: Any) -> dict[str, str]:
    return render(InfraConfig.model_validate(fields), {})


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize("fields", [{}, {"gpu": {"max": 0}}, {"gpu": {"min": 3, "max": 9, "gpus": 2}, "extras": []}])
def test_ray_takes_the_file(cloud: str, fields: dict[str, Any]) -> None:
    config = prepare_config(yaml.safe_load(rendered(**fields)[f"launcher/{cloud}.yaml"]))
    validate_config(config)
    gpu = {"min": 0, "max": 4, "gpus": 1, **fields.get("gpu", {})}
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["cpu"]["resources"] == {"CPU": 8}
    assert config["max_workers"] == 4 + gpu["max"]
    if gpu["max"]:
        assert types["gpu"]["resources"] == {"CPU": 8, "GPU": gpu["gpus"]}
        assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (gpu["min"], gpu["max"])
    else:
        assert "gpu" not in types


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_commands_are_one_line_that_a_shell_takes_as_meant(cloud: str) -> None:
    config = yaml.safe_load(rendered(env={"NOTE": "it's $HOME; rm -rf"}, stop_grace_s=70)[f"launcher/{cloud}.yaml"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(config[key][-1])
        assert {"RAY_AUTH_MODE=token", "RAY_JOB_STOP_WAIT_TIME_S=70", "NOTE=it's $HOME; rm -rf"} <= set(words)
    # Who has no token reaches nothing: the file is on every node, and nodes do not start without it.
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    head = shlex.split(config["head_start_ray_commands"][-1])
    assert {"--head", "--num-cpus=0", "--dashboard-host=127.0.0.1"} <= set(head)
    wheel = Path(config["file_mounts"]["~/maskmill/maskmill-0.1.0-py3-none-any.whl"])
    (install,) = [command for command in config["setup_commands"] if "pip install" in command]
    assert f"maskmill/{wheel.name}[" in install
    assert "--constraint" in install


def matches(given: str | Sequence[str], what: str) -> bool:
    return any(fnmatchcase(what, pattern) for pattern in ([given] if isinstance(given, str) else given))


def allowed(policy: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]) -> bool:
    """IAM's answer for policies that only allow, by StringEquals and StringLike."""
    for statement in policy["Statement"]:
        conditions = [
            (operator, key, value)
            for operator, tests in statement.get("Condition", {}).items()
            for key, value in tests.items()
        ]
        assert {operator for operator, _, _ in conditions} <= {"StringEquals", "StringLike"}
        if (
            matches(statement["Action"], action)
            and matches(statement["Resource"], resource)
            and all(key in context and matches(value, context[key]) for _, key, value in conditions)
        ):
            return True
    return False


STORAGE = {"read": ["s3://corpus/train/", "s3://whole"], "write": ["s3://corpus/out"]}


@pytest.mark.parametrize(
    ("action", "resource", "prefix", "expected"),
    [
        ("s3:GetObject", "corpus/train/a.tar", None, True),
        ("s3:GetObject", "corpus/trainer/a.tar", None, False),
        ("s3:GetObject", "corpus/secret", None, False),
        ("s3:PutObject", "corpus/train/a.tar", None, False),
        ("s3:DeleteObject", "corpus/train/a.tar", None, False),
        ("s3:PutObject", "corpus/out/model=m/part.parquet", None, True),
        ("s3:DeleteObject", "corpus/out/_delta_log/0.json", None, True),
        ("s3:AbortMultipartUpload", "corpus/out/part.parquet", None, True),
        ("s3:PutBucketPolicy", "corpus", None, False),
        ("s3:GetObject", "whole/any/thing", None, True),
        ("s3:PutObject", "whole/any/thing", None, False),
        ("s3:ListBucket", "corpus", "train/", True),
        ("s3:ListBucket", "corpus", "out/_delta_log/", True),
        ("s3:ListBucket", "corpus", "", False),
        ("s3:ListBucket", "corpus", "secret/", False),
        ("s3:ListBucket", "whole", "", True),
    ],
)
def test_nodes_reach_their_prefixes_and_nothing_else(
    action: str, resource: str, prefix: str | None, expected: bool
) -> None:
    policy = json.loads(rendered(storage=STORAGE)["iam/data-policy.json"])
    context = {} if prefix is None else {"s3:prefix": prefix}
    assert allowed(policy, action, f"arn:aws:s3:::{resource}", context) is expected


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An AWS account of this process's own, and a home without anybody's keys."""
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-west-2")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        yield


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize("storage", [STORAGE, {"read": ["s3://corpus"]}, {"write": ["s3://corpus"]}])
def test_iam_takes_the_policies(storage: dict[str, Any]) -> None:
    """Their grammar, as moto's port of IAM's validation sees it."""
    iam = boto3.client("iam")
    files = rendered(storage=storage)
    for name in ("data", "launcher"):
        iam.create_policy(PolicyName=name, PolicyDocument=files[f"iam/{name}-policy.json"])
    iam.create_role(RoleName="node", AssumeRolePolicyDocument=TRUST.read_text())
    with pytest.raises(iam.exceptions.MalformedPolicyDocumentException):
        iam.create_policy(PolicyName="x", PolicyDocument=files["iam/data-policy.json"].replace('"Allow"', '"Perhaps"'))


TYPES = [
    {
        "InstanceType": name,
        "VCpuInfo": {"DefaultVCpus": cpus},
        "MemoryInfo": {"SizeInMiB": mib},
        **({"GpuInfo": {"Gpus": [{"Name": "L4", "Count": gpus, "Manufacturer": "NVIDIA"}]}} if gpus else {}),
    }
    for name, cpus, mib, gpus in (
        ("m7i.xlarge", 4, 16384, 0),
        ("c7i.2xlarge", 8, 16384, 0),
        ("g6.2xlarge", 8, 32768, 1),
    )
]


@pytest.mark.usefixtures("account")
def test_the_launcher_starts_nodes_with_the_rights_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own launcher over moto's EC2; each call is held against the policy, and the other way round."""
    iam = boto3.client("iam")
    for name in ("maskmill-head", "maskmill-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=TRUST.read_text())
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    files = rendered(aws={"image_id": image})
    calls: list[tuple[str, dict[str, Any]]] = []
    original = botocore.client.BaseClient._make_api_call

    def recorded(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        calls.append((f"{client.meta.service_model.endpoint_prefix}:{operation}", arguments))
        # moto knows these too, and takes most of a minute to say all that it knows.
        return (
            {"InstanceTypes": TYPES} if operation == "DescribeInstanceTypes" else original(client, operation, arguments)
        )

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
    config = prepare_config(yaml.safe_load(files["launcher/aws.yaml"]))
    validate_config(config)
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
    nodes = provider.non_terminated_nodes({})
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.non_terminated_nodes({})
    provider.terminate_nodes(nodes)

    started = {}
    for action, arguments in calls:
        if action == "ec2:RunInstances":
            tags = {tag["Key"]: tag["Value"] for tag in arguments["TagSpecifications"][0]["Tags"]}
            started[tags["ray-user-node-type"]] = arguments
            assert tags["ray-cluster-name"] == "maskmill"
            assert arguments["MetadataOptions"]["HttpTokens"] == "required"
    assert {name: arguments["IamInstanceProfile"]["Name"] for name, arguments in started.items()} == {
        "head": "maskmill-head",
        "cpu": "maskmill-worker",
        "gpu": "maskmill-worker",
    }
    assert {name for name, arguments in started.items() if "InstanceMarketOptions" in arguments} == {"cpu", "gpu"}

    policy = json.loads(files["iam/launcher-policy.json"])
    granted = {action for statement in policy["Statement"] for action in statement["Action"]}
    used = {action for action, _ in calls}
    # Giving nodes their profile is a right without a call; tags at the start are, too.
    assert used | {"ec2:CreateTags", "iam:PassRole"} == granted
    ec2 = "arn:aws:ec2:us-west-2:111122223333"
    ours, others = ({"aws:ResourceTag/ray-cluster-name": name} for name in ("maskmill", "somebody-elses"))
    assert allowed(policy, "ec2:TerminateInstances", f"{ec2}:instance/i-1", ours)
    assert not allowed(policy, "ec2:TerminateInstances", f"{ec2}:instance/i-1", others)
    assert not allowed(policy, "ec2:RunInstances", f"{ec2}:instance/*", {})
    assert allowed(policy, "ec2:RunInstances", f"arn:aws:ec2:us-west-2::image/{image}", {})
    passed = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert allowed(policy, "iam:PassRole", "arn:aws:iam::111122223333:role/maskmill-worker", passed)
    assert not allowed(policy, "iam:PassRole", "arn:aws:iam::111122223333:role/admin", passed)


def test_actions_of_the_launcher_exist() -> None:
    """A misspelled right is no error to IAM, it just grants nothing."""
    known = {f"ec2:{name}" for name in boto3.client("ec2", "us-west-2").meta.service_model.operation_names}
    text = rendered()["iam/launcher-policy.json"]
    actions = set(re.findall(r'"(ec2:[A-Z][A-Za-z]+)"', text)) - {"ec2:CreateAction"}
    assert actions <= known
