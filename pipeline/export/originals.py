"""The images of an export, read from the source in the order of the rows, a shard's stream at a time."""

import io
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from pipeline.config import SourceConfig
from pipeline.errors import CorruptImageError, TargetMismatchError, UnreadableError
from pipeline.images import FORMATS, ORIENTATION_TAG, decode_image
from pipeline.sources.base import AllBut, Sample, Unit, UnitEnd, read_unit
from pipeline.sources.pack import SIGNATURES
from pipeline.sources.registry import open_source

__all__ = ["Originals", "matching", "upright"]


class Originals:
    """Images of rows that are asked for by shard and position, once each and best in ascending order.

    positions: what will be asked for, by shard.
    """

    def __init__(self, config: SourceConfig, units: Mapping[str, Unit], positions: Mapping[str, Sequence[int]]) -> None:
        self._source = open_source(config)
        self._max_pixels = config.max_pixels
        self._units = units
        self._left = {shard: set(places) for shard, places in positions.items()}
        self._open: tuple[str, int, Iterator[Sample | UnitEnd]] | None = None

    def get(self, shard_id: str, position: int) -> bytes:
        """Encoded bytes. Raises RowError where the source cannot give them."""
        unit = self._units.get(shard_id)
        if unit is None:
            raise UnreadableError(f"the source has no {shard_id}")
        if self._open is None or self._open[0] != shard_id or self._open[1] >= position:
            wanted = frozenset(self._left.get(shard_id, {position}))
            self._open = shard_id, -1, read_unit(self._source, unit, AllBut(wanted, unit.rows))
        for item in self._open[2]:
            if isinstance(item, UnitEnd):
                break
            self._open = shard_id, item.position, self._open[2]
            self._left.get(shard_id, set()).discard(item.position)
            if item.position == position:
                if item.error is not None:
                    raise item.error
                return item.image
        self._open = None
        raise UnreadableError(f"{shard_id} has no image at position {position}")

    @property
    def max_pixels(self) -> int:
        return self._max_pixels


def upright(data: bytes, *, max_pixels: int) -> tuple[bytes, str, int, int]:
    """An encoded image as most readers take it: bytes, suffix, width and height.

    As it is, unless its EXIF block turns it or it is of a kind that few readers take (TIFF): then as a PNG of what was
    labelled. Raises RowError.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION_TAG, 1) not in (0, 1)
    except Exception as error:
        raise CorruptImageError(f"not a readable image: starts with {data[:8]!r}") from error
    suffix = next((suffix for signature, suffix in SIGNATURES if data.startswith(signature)), "")
    if suffix and suffix != ".tif" and not turned:
        return data, suffix, width, height
    image_HWC = decode_image(data, max_pixels=max_pixels)
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), ".png", image_HWC.shape[1], image_HWC.shape[0]


def matching(data: bytes, row: Mapping[str, object], *, max_pixels: int) -> tuple[bytes, str, int, int]:
    """`upright`. Raises TargetMismatchError where the image has another size than the row: others were labelled."""
    found = upright(data, max_pixels=max_pixels)
    if row["width"] is not None and found[2:] != (row["width"], row["height"]):
        raise TargetMismatchError(
            f"expected an image of {row['width']}x{row['height']} as labelled, the source has {found[2]}x{found[3]}"
        )
    return found
