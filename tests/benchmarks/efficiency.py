"""How close labelling comes to its limit: end to end over the same model on ready tensors, in one run.

    python tests/benchmarks/efficiency.py --model unet_small --size 640x480

The limit is the bare forward pass over batches of the same shape, on tensors that are already normalised, in a process
of its own with the same number of threads, memory layout and malloc settings. End to end counts from the first window's
start to the last's arrival at the driver: reading tars, decoding JPEG, resizing, predicting, upsampling to the image's
size, argmax, PNG, Parquet. Both alternate, and medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))


def limit(model: str, batch: int, height: int, width: int, seconds: float, threads: int) -> float:
    """Images per second of the forward pass alone."""
    import torch

    from pipeline.config import ModelConfig
    from pipeline.models.load import load_model

    torch.set_num_threads(threads)
    loaded = load_model(ModelConfig(name=model), seed=0, tile_pixels=1 << 22)
    size = loaded.preprocess.padded(*loaded.preprocess.size(height, width))
    image_BCHW = torch.randn(batch, 3, *size).contiguous(memory_format=torch.channels_last)
    loaded.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        for _ in range(2):
            loaded.module(image_BCHW)
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            loaded.module(image_BCHW)
            images += batch
        return images / (time.perf_counter() - started)


def end_to_end(model: str, shards: Path, pixels: int, layout: str) -> dict[str, float]:
    """Images per second of `maskmill label`, start-up left out, and where its threads' time went."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "labels"
        command = [
            sys.executable,
            "-m",
            "jobs.label",
            "source.format=webdataset",
            f"source.uri={shards}",
            f"models.0.name={model}",
            f"output.uri={output}",
            f"resources.batch_pixels={pixels}",
            f"resources.layout={layout}",
        ]
        # Ray's workers give way to other processes (nice 15); the bare forward pass does not.
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
        run = json.loads((output / "run.json").read_text())
    return {"images_per_s": run["images"] / run["label_s"], **dict(run["seconds"].items())}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet_small")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--images", type=int, default=40, help="per shard")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layout", default="fused")
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "maskmill-benchmark"))
    arguments = parser.parse_args()
    from corpus import jpeg_shards

    width, height = map(int, arguments.size.split("x"))
    shards = jpeg_shards(
        Path(arguments.folder) / f"jpeg-{arguments.size}-{arguments.shards}x{arguments.images}",
        shards=arguments.shards,
        images=arguments.images,
        width=width,
        height=height,
    )
    from pipeline.dataflow.cluster import ENVIRONMENT
    from pipeline.models.registry import find_model

    preprocess = find_model(arguments.model).preprocess
    padded = preprocess.padded(*preprocess.size(height, width))
    threads = len(os.sched_getaffinity(0))
    limits, ends = [], []
    for _ in range(arguments.rounds):
        call = f"limit({arguments.model!r}, {arguments.batch}, {height}, {width}, 15, {threads})"
        code = f"from efficiency import limit; print({call})"
        environment = {**os.environ, **ENVIRONMENT["env_vars"], "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
        printed = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        limits.append(float(printed.stdout))
        ends.append(end_to_end(arguments.model, shards, arguments.batch * padded[0] * padded[1], arguments.layout))
        predicting = arguments.shards * arguments.images / ends[-1]["predict"]
        print(
            f"limit {limits[-1]:.2f} img/s, end to end {ends[-1]['images_per_s']:.2f} img/s "
            f"({predicting:.2f} img/s while predicting)",
            flush=True,
        )
    ratio = statistics.median(e["images_per_s"] for e in ends) / statistics.median(limits)
    stages = {k: statistics.median(e[k] for e in ends) for k in ends[0] if k != "images_per_s"}
    total = sum(stages.values())
    shares = ", ".join(f"{stage} {value / total:.1%}" for stage, value in stages.items())
    print(f"{arguments.model} on {arguments.size}, {threads} threads: {ratio:.3f} of the limit; thread time: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
