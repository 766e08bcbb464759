"""A Ray cluster of several nodes on this machine, each started by `ray start` as a user would, with ports of its own.

with LocalCluster(nodes=2) as cluster:
    ...                                     # jobs join it with cluster.environment
    cluster.nodes[1].kill()
    cluster.add()
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

__all__ = ["LocalCluster", "LocalNode", "free_ports", "outside_environment"]

RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 30.0
NODE_MEMORY_BYTES = 4_000_000_000  # each node would count all of the machine's
OBJECT_STORE_BYTES = 100_000_000
HEAD = "f" * 51 + "00000"  # the head's node, as Ray's provider of nodes that are processes calls it
# A busy machine takes longer than the 30 seconds that Ray gives a node.
PATIENCE = {"RAY_raylet_start_wait_time_s": "150"}


def outside_environment() -> dict[str, str]:
    """Of somebody who is on no cluster yet, and needs no proxy to reach this machine."""
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS" and "proxy" not in key.lower()}
    return {**own, "PATH": f"{RAY.parent}{os.pathsep}{own['PATH']}"}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass(frozen=True)
class LocalNode:
    """One node: `ray start --block` and what it started. name: what its processes tell S3 servers that they are."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Everything of this node that is alive."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def service(self, name: str) -> psutil.Process:
        """Its `raylet` or, of a head, its `gcs_server`. Raises RuntimeError where there is none."""
        for process in self.processes():
            try:
                if process.name() == name:
                    return process
            except psutil.Error:  # it ends while one looks
                continue
        raise RuntimeError(f"node {self.name} has no {name}: {self.log.read_text()[-2000:]}")

    def wait(self) -> None:
        """Until it has ended, with whatever it started."""
        left = self.processes()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        _, alive = psutil.wait_procs(left, timeout=END_TIMEOUT_S)
        for process in alive:
            process.kill()

    def stop(self) -> None:
        """As `ray stop` or a spot instance's end would: SIGTERM, and time to go."""
        self.process.terminate()
        self.wait()


class LocalCluster:
    """A context manager. nodes: the head first. home: its folder, short because Unix sockets lie in it.

    environment: of a process that joins it, with the token that its nodes share. job_server: where jobs are sent to."""

    def __init__(
        self, *, nodes: int, cpus: int = 2, job_server: bool = False, grows: dict[str, float] | None = None
    ) -> None:
        """grows: what each node has that Ray's autoscaler brings when it is needed, three at most."""
        self._count = nodes
        self._cpus = cpus
        self._started = 0
        self._grows = grows
        self._head_port, self._client_port, self._dashboard_port = free_ports(3)
        self.address = f"127.0.0.1:{self._head_port}"
        self.job_server = f"http://127.0.0.1:{self._dashboard_port}" if job_server else ""
        self.home = Path(tempfile.mkdtemp(prefix="mm-"))
        self.nodes: list[LocalNode] = []
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = {**outside_environment(), **PATIENCE, **token}
        self.environment = {**self._environment, "RAY_ADDRESS": self.address}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def start(self) -> None:
        """All nodes; after a head that died too."""
        head = self._ray_start(
            "--head", f"--port={self._head_port}", f"--ray-client-server-port={self._client_port}",
            f"--include-dashboard={str(bool(self.job_server)).lower()}", f"--dashboard-port={self._dashboard_port}",
            f"--temp-dir={self.home / f'h{self._started}'}", *self._autoscaling(),
        )  # fmt: skip
        self._wait_for(head)
        self._wait_for_jobs(head)
        # One after the other: raylets of one folder that start at once may choose the same socket.
        for _ in range(self._count - 1):
            self.add()

    def _autoscaling(self) -> list[str]:
        """Of a head with an autoscaler, whose nodes are processes of this machine too."""
        if self._grows is None:
            return []
        provider = {
            "type": "fake_multinode",
            "gcs_address": self.address,
            "launch_multiple": True,
            "head_node_id": HEAD,
        }
        kinds = {
            "ray.head.default": {"resources": {"CPU": self._cpus}, "node_config": {}, "max_workers": 0},
            "more": {"resources": self._grows, "node_config": {}, "min_workers": 0, "max_workers": 3},
        }
        file = self.home / "autoscaling.json"
        file.write_text(
            json.dumps(
                {
                    "cluster_name": "maskmill",
                    "max_workers": 3,
                    "idle_timeout_minutes": 0.2,
                    "upscaling_speed": 1.0,
                    "provider": provider,
                    "available_node_types": kinds,
                    "head_node_type": "ray.head.default",
                    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
                    "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
                    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
                    "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [],
                }
            )
        )  # fmt: skip
        self._environment |= {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        return [f"--autoscaling-config={file}"]

    def add(self) -> LocalNode:
        """One more node."""
        node = self._ray_start(f"--address={self.address}")
        self._wait_for(node)
        return node

    def stop(self) -> None:
        """End every node, the head last."""
        for node in reversed(self.nodes):
            node.process.terminate()
        for node in reversed(self.nodes):
            node.wait()
        self.nodes.clear()

    def _ray_start(self, *arguments: str) -> LocalNode:
        (agent,) = free_ports(1)
        name = f"node-{self._started}"
        self._started += 1
        log = self.home / f"{name}.log"
        command = [
            str(RAY), "start", "--block", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}",
            f"--num-cpus={self._cpus}", f"--memory={NODE_MEMORY_BYTES}",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        # botocore puts it into each request's User-Agent: a server knows which node a file came from.
        environment = {**self._environment, "AWS_SDK_UA_APP_ID": name}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=self.home, start_new_session=True
            )
        self.nodes.append(LocalNode(name, process, log))
        return self.nodes[-1]

    def _wait_for_jobs(self, head: LocalNode) -> None:
        """Until the job server answers, where there is one. Raises RuntimeError."""
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.job_server:
            try:
                asked = urllib.request.Request(f"{self.job_server}/api/jobs/", headers=token)
                straight.open(asked, timeout=10).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the job server did not answer: {head.log.read_text()[-2000:]}") from error
                time.sleep(0.5)

    def _wait_for(self, node: LocalNode) -> None:
        """Raises RuntimeError where it ends or does not start in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in node.log.read_text():
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"node {node.name} did not start: {node.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def workers(self) -> list[tuple[str, psutil.Process]]:
        """(title, process) of every actor and task worker on the cluster."""
        found = []
        for node in self.nodes:
            for process in node.processes():
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if title.startswith("ray::"):
                    found.append((title, process))
        return found
