"""Values of a cluster: sizes, images, places and jobs, from which `maskmill infra` writes manifests."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Section

__all__ = ["InfraConfig"]

# A DNS label, short enough for the suffixes that KubeRay appends to a cluster's name.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
# Quoted wherever it is written; a line break could still end a shell command or a YAML comment.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+$")]
Uri = Annotated[str, Field(pattern=r"^s3://[a-z0-9.-]{3,63}(/[A-Za-z0-9._/=+-]*)?$")]
Gibibytes = Annotated[int, Field(ge=1, le=100_000)]


class HeadValues(Section):
    """The head runs the driver, and no tasks."""

    cpus: int = Field(4, ge=1, description="CPUs of the head's container; it takes no tasks")
    memory_gib: Gibibytes = Field(16, description="GiB of the head's container: the driver's plan and Ray's tables")


class GroupValues(Section):
    """Workers that are alike."""

    min: int = Field(0, ge=0, description="workers that are always there")
    max: int = Field(0, ge=0, description="workers that the autoscaler may have; 0: no such group")
    cpus: int = Field(8, ge=1, description="CPUs of one worker")
    memory_gib: Gibibytes = Field(32, description="GiB of one worker, its object store in /dev/shm included")
    object_store_share: float = Field(
        0.25, ge=0.05, le=0.6, description="of memory_gib for the object store: encoded images and rows wait there"
    )
    gpus: int = Field(0, ge=0, description="GPUs of one worker")
    scratch_gib: Gibibytes = Field(
        50, description="GiB of disk for /tmp and caches; a worker that needs more is evicted"
    )
    spot: bool = Field(True, description="may run on nodes that the cloud takes back")
    node_labels: dict[Line, Line] = Field({}, description="labels that its nodes must have, such as an instance type")

    @model_validator(mode="after")
    def _min_fits(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must be at most max ({self.max}), got {self.min}")
        return self


class GpuGroupValues(GroupValues):
    max: int = Field(4, ge=0, description="workers that the autoscaler may have; 0: no such group")
    gpus: int = Field(1, ge=1, description="GPUs of one worker")
    taints: tuple[Line, ...] = Field(("nvidia.com/gpu",), description="taints of GPU nodes that it tolerates")


class CpuGroupValues(GroupValues):
    max: int = Field(4, ge=0, description="workers that the autoscaler may have; 0: no such group")
    gpus: Literal[0] = Field(0, description="none")


class RedisValues(Section):
    """A Redis outside of the cluster, in which the head's state outlives the head."""

    address: Line = Field(description="host:port or rediss://host:port")
    password_secret: Line = Field(description="Secret with its password")
    password_key: Line = Field("password", description="key in that Secret")


class KubernetesValues(Section):
    namespace: Name = Field("default", description="where everything is made")
    image_pull_secret: Line | None = Field(None, description="Secret that pulls the image from a private registry")
    spot_platform: Literal["gke", "eks", "karpenter", "aks", "none"] = Field(
        "none", description="how nodes that the cloud takes back are marked; none: workers run on any node"
    )
    env_from_secrets: tuple[Line, ...] = Field(
        (), description="Secrets whose keys become environment variables: AWS_ACCESS_KEY_ID, HF_TOKEN, ..."
    )
    service_account_annotations: dict[Line, Line] = Field(
        {}, description="bind pods to a cloud identity (eks.amazonaws.com/role-arn, iam.gke.io/gcp-service-account)"
    )
    redis: RedisValues | None = Field(None, description="keeps the cluster's state through a restart of its head")
    network_policy: bool = Field(
        True, description="only the cluster's own pods, KubeRay and Prometheus reach its ports"
    )
    monitor_labels: dict[Line, Line] = Field(
        {"release": "prometheus"}, description="labels by which your Prometheus finds PodMonitors"
    )
    monitor_namespace: Name = Field("monitoring", description="where your Prometheus runs")


class AwsValues(Section):
    region: Line = Field("us-west-2", description="where the nodes run; keep it the bucket's")
    zones: Line = Field("us-west-2a,us-west-2b", description="zones that are tried in this order")
    image_id: str = Field(
        "ami-00000000000000000",
        pattern=r"^ami-[0-9a-f]{8,17}$",
        description="an Ubuntu 24.04 image with NVIDIA's driver; docs/cluster.md has the command that finds it",
    )
    head_type: Line = Field("m7i.xlarge", description="instance type of the head")
    cpu_type: Line = Field("c7i.2xlarge", description="instance type of CPU workers")
    gpu_type: Line = Field("g6.2xlarge", description="instance type of GPU workers")
    head_profile: Name = Field(
        "maskmill-head", description="instance profile and role of the head, which starts and ends workers"
    )
    worker_profile: Name = Field("maskmill-worker", description="instance profile and role of workers: data alone")


class GcpValues(Section):
    project: Line = Field("my-project", description="project id")
    region: Line = Field("us-central1", description="where the nodes run; keep it the bucket's")
    zone: Line = Field("us-central1-a", description="one zone that has the GPUs")
    image: Line = Field(
        "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2404-nvidia-570",
        description="a boot image with NVIDIA's driver and Python 3.11 or newer",
    )
    head_type: Line = Field("n2-standard-4", description="machine type of the head")
    cpu_type: Line = Field("c2-standard-8", description="machine type of CPU workers")
    gpu_type: Line = Field("g2-standard-8", description="machine type of GPU workers; of the G2 and A2 kinds")
    head_service_account: Line = Field(
        "maskmill-head@my-project.iam.gserviceaccount.com", description="of the head, which starts and ends workers"
    )
    worker_service_account: Line = Field(
        "maskmill-worker@my-project.iam.gserviceaccount.com", description="of workers: data alone"
    )


class StorageValues(Section):
    """What nodes may reach; for the IAM policy."""

    read: tuple[Uri, ...] = Field((), description="prefixes of inputs: listed and read")
    write: tuple[Uri, ...] = Field((), description="prefixes of outputs: listed, read, written, deleted")


class InfraConfig(Section):
    """Manifests of a cluster, from values: KubeRay, Ray's launcher on AWS and GCP, IAM policies, monitoring."""

    name: Name = Field("maskmill", description="of the cluster, and the first part of every other name")
    image: Line = Field("maskmill:0.1.0-cuda", description="what infra/Dockerfile builds, as your registry names it")
    cpu_image: Line | None = Field(None, description="image of nodes without GPUs; default: image")
    wheel: str = Field(
        "dist/maskmill-0.1.0-py3-none-any.whl",
        pattern=r"^[A-Za-z0-9._+~/-]+\.whl$",
        description="what the launcher's nodes install, with constraints.txt",
    )
    extras: tuple[Name, ...] = Field(("hf", "smp"), description="extras of maskmill that the launcher's nodes install")
    head: HeadValues = Field(HeadValues(), description="the head")
    cpu: CpuGroupValues = Field(CpuGroupValues(), description="workers without GPUs: reading, packing, scoring")
    gpu: GpuGroupValues = Field(GpuGroupValues(), description="workers with GPUs: labelling and training")
    idle_timeout_s: int = Field(300, ge=1, description="a worker with nothing to do for so long is given back")
    stop_grace_s: int = Field(
        90, ge=10, le=3600, description="what a job that is asked to stop has for its last commit or checkpoint"
    )
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(
        {}, description="environment of all nodes; no secrets, they come from Kubernetes Secrets or the nodes' identity"
    )
    jobs: dict[Literal["label", "train", "evaluate"], Line] = Field(
        {}, description="config of the RayJob of each kind, a path or URI; it is checked and put into a ConfigMap"
    )
    job_retries: int = Field(3, ge=0, description="new clusters for a job that failed; each goes on where it stopped")
    job_ttl_s: int = Field(600, ge=0, description="a finished job's cluster stays so long, for its logs and dashboard")
    kubernetes: KubernetesValues = Field(KubernetesValues(), description="KubeRay")
    aws: AwsValues = Field(AwsValues(), description="Ray's launcher on AWS")
    gcp: GcpValues = Field(GcpValues(), description="Ray's launcher on GCP")
    storage: StorageValues = Field(StorageValues(), description="buckets")

    @model_validator(mode="after")
    def _has_workers(self) -> Self:
        if not self.cpu.max and not self.gpu.max:
            raise ValueError("one of cpu.max and gpu.max must be 1 or more: the head takes no tasks")
        if "evaluate" in self.jobs and not self.cpu.max:
            raise ValueError("cpu.max must be 1 or more for jobs.evaluate, which needs no GPU")
        return self
