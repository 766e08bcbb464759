"""Peak memory of an export by rows: `python tests/benchmarks/export_memory.py [FORMAT ...]`.

Each count of rows is exported by a process of its own, in two threads, from a table of generated label maps of large
blocks (160x120), so that what grows with the rows would show.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

CHILD = """
import resource, sys
from jobs import export
code = export.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, code)
"""


def measure(count: int, forms: list[str]) -> dict[str, int]:
    """Peak resident MB of the exporting process, by format."""
    import numpy as np
    from export_helpers import SPACE, write_table

    from pipeline.masks import encode_label_map

    rng = np.random.default_rng(0)
    maps = []
    for _ in range(50):
        blocks = rng.choice([*SPACE.ids, SPACE.void_id], (24, 32)).astype(np.uint8)
        maps.append(encode_label_map(blocks.repeat(5, axis=0).repeat(5, axis=1)))
    rows = [
        {
            "image_id": f"shard-{n // 1000:03d}.tar/{n:06d}",
            "shard_id": f"shard-{n // 1000:03d}.tar",
            "position": n % 1000,
            "status": "ok",
            "width": 160,
            "height": 120,
            "semantic": {"format": "png", "data": maps[n % 50]},
        }
        for n in range(count)
    ]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_table(f"{folder}/table", rows, task="semantic", taxonomy=SPACE, source={}, files_of=256)
        for form in forms:
            arguments = [f"table.uri={folder}/table", f"format={form}", f"output.uri={folder}/{form}", "workers=2"]
            command = [sys.executable, "-c", CHILD, *arguments, "images=false"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            megabytes, code = done.stdout.split()
            if code != "0":
                raise RuntimeError(done.stderr)
            found[form] = int(megabytes)
    return found


if __name__ == "__main__":
    formats = sys.argv[1:] or ["coco", "id_png"]
    print(json.dumps({str(count): measure(count, formats) for count in (1000, 10_000)}))
