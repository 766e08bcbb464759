"""Training through Ray Train against a plain torch loop with a DataLoader: images per second, in one run.

    python tests/benchmarks/training.py

Same images (JPEG and PNG files), model, batch, augmentation (left to right), optimiser, loss, memory layout and
number of torch threads. The plain loop is what people write: Pillow, torchvision's transforms, a DataLoader with as
many worker processes as serve it best (`--loaders`). Both train some epochs; the first warms up, the median of the
others counts.
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
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def corpus(folder: Path, images: int, width: int, height: int) -> Path:
    """`images/*.jpg` and `labels/*.png` below `folder`, unless they are there already."""
    from PIL import Image

    from pipeline.sources.scenes import render_scene

    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(images):
        target = folder / "labels" / f"{index:05d}.png"
        if not target.exists():
            scene = render_scene(index, width=width, height=height)
            Image.fromarray(scene.image_HWC).save(folder / "images" / f"{index:05d}.jpg", quality=90)
            Image.fromarray(scene.semantic_HW).save(target)
    return folder


def plain(folder: Path, batch: int, epochs: int, loaders: int, precision: str) -> list[float]:
    """Images per second of each epoch."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    from pipeline.models.zoo.unet import UNetSmall

    class Pairs(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted((folder / "images").iterdir())
            self.transform = v2.Compose(
                [
                    v2.RandomHorizontalFlip(),
                    v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            )

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            path = self.paths[index]
            image = tv_tensors.Image(Image.open(path).convert("RGB"))
            label = Image.open(folder / "labels" / f"{path.stem}.png")
            return self.transform(image, tv_tensors.Mask(np.asarray(label).astype("int64")))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = UNetSmall(8).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of = torch.nn.CrossEntropyLoss(ignore_index=255)
    loader = DataLoader(
        Pairs(),
        batch,
        shuffle=True,
        num_workers=loaders,
        persistent_workers=loaders > 0,
        pin_memory=device.type == "cuda",
    )
    speeds = []
    for _ in range(epochs):
        started, images = time.perf_counter(), 0
        for image_BCHW, label_BHW in loader:
            image_BCHW = image_BCHW.to(device, memory_format=torch.channels_last, non_blocking=True)
            label_BHW = label_BHW.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(model(image_BCHW).float(), label_BHW)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            images += len(image_BCHW)
            loss.item()
        speeds.append(images / (time.perf_counter() - started))
    return speeds


def on_ray(folder: Path, batch: int, epochs: int, precision: str) -> list[float]:
    """Images per second of each epoch of `maskmill train`."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *(sys.executable, "-m", "jobs.train", "source.format=files", f"source.uri={folder}"),
            *("source.images=images/{id}.jpg", "source.targets.semantic=labels/{id}.png"),
            *("model.name=unet_small", f"batch_images={batch}", f"epochs={epochs}", f"precision={precision}"),
            f"output.uri={output}",
        ]
        # Ray's workers give way to other processes (nice 15); the plain loop does not.
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
        rows = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["images_per_s"] for row in rows]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--size", default="256x192")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "maskmill-benchmark"))
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    name = f"training-{arguments.size}-{arguments.images}"
    folder = corpus(Path(arguments.folder) / name, arguments.images, width, height)
    shared = (arguments.batch, arguments.epochs)
    speeds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for loaders in arguments.loaders:
            call = f"plain(Path({str(folder)!r}), {shared[0]}, {shared[1]}, {loaders}, {arguments.precision!r})"
            code = f"from pathlib import Path; from training import plain; print(*{call})"
            environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
            printed = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            speeds.setdefault(f"{loaders} loaders", []).extend(map(float, printed.stdout.split()[1:]))
        speeds.setdefault("maskmill", []).extend(on_ray(folder, *shared, arguments.precision)[1:])
        print({name: round(statistics.median(values), 2) for name, values in speeds.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max((name for name in medians if name != "maskmill"), key=medians.__getitem__)
    print(f"{medians['maskmill'] / medians[best]:.3f} of a plain loop with {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
