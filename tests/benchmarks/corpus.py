"""A corpus like the ones that people label: JPEG photographs' sizes and weights, made from scenes."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from pipeline.sources.scenes import render_scene

__all__ = ["jpeg_shards"]


def jpeg_shards(folder: Path, *, shards: int, images: int, width: int, height: int) -> Path:
    """Tar shards of JPEGs (quality 90) below `folder`, unless they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"shard-{shard:03d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for index in range(images):
                scene = render_scene(shard * images + index, width=width, height=height)
                buffer = io.BytesIO()
                Image.fromarray(scene.image_HWC).save(buffer, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
        path.with_suffix(".part").rename(path)
    return folder
