"""Does the driver's memory grow with the corpus? Labels tiny scenes with a model that costs nothing.

    python tests/ray/driver_memory.py --small 1000 --large 100000

Prints the driver's peak resident memory for both. Exit status 0 says that the large one took less than 150 MB more.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from deltalake import DeltaTable

REPOSITORY = Path(__file__).resolve().parents[2]
ALLOWED_BYTES = 150_000_000


def peak_bytes(count: int, unit_images: int, timeout_s: float) -> int:
    """Peak resident bytes of the driver process alone over one run of `count` scenes."""
    with tempfile.TemporaryDirectory(prefix="maskmill-memory-") as folder:
        command = [
            sys.executable,
            "-m",
            "jobs.label",
            "source.format=scenes",
            f"source.count={count}",
            "source.width=32",
            "source.height=32",
            "source.targets=[]",
            f"source.unit_images={unit_images}",
            "models.0.name=null_model",
            f"output.uri={folder}/labels",
            "output.commit_interval_s=1",
        ]
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = psutil.Process(driver.pid)
        peak, deadline = 0, time.monotonic() + timeout_s
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"{count} scenes took more than {timeout_s} s"
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.2)
        assert driver.wait() == 0
        rows = sum(DeltaTable(f"{folder}/labels").get_add_actions(flatten=True).column("num_records").to_pylist())
        assert rows == count, f"expected {count} rows, got {rows}"
    return peak


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--unit-images", type=int, default=500)
    parser.add_argument("--timeout", type=float, default=3600)
    arguments = parser.parse_args()
    small = peak_bytes(arguments.small, arguments.unit_images, arguments.timeout)
    print(f"{arguments.small} scenes: driver at most {small / 1e6:.0f} MB", flush=True)
    started = time.monotonic()
    large = peak_bytes(arguments.large, arguments.unit_images, arguments.timeout)
    seconds = time.monotonic() - started
    more = (large - small) / 1e6
    print(f"{arguments.large} scenes: driver at most {large / 1e6:.0f} MB, {more:+.0f} MB, {seconds:.0f} s")
    return 0 if large - small < ALLOWED_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
