"""Selective search: regions of an image that may be objects, by grouping superpixels from the bottom up.

Written from the paper: Uijlings, van de Sande, Gevers, Smeulders 2013, https://doi.org/10.1007/s11263-013-0620-5. The
superpixels (Felzenszwalb & Huttenlocher 2004) are scikit-image's, so it needs the extra `classic`.

Axes: H rows, W columns, C channels, S superpixels, R regions.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pipeline.models.extras import import_extra

__all__ = ["EXTRA", "Grouping", "Regions", "SearchMode", "color_space", "group", "selective_search"]

EXTRA = "classic"
SearchMode = Literal["single", "fast", "quality"]
Similarity = tuple[str, ...]
ALL: Similarity = ("color", "texture", "size", "fill")
# Of the paper's two published methods: colour spaces, similarities, and thresholds k of the superpixels, all combined.
MODES: dict[SearchMode, tuple[tuple[str, ...], tuple[Similarity, ...], tuple[float, ...]]] = {
    "single": (("hsv",), (ALL,), (100.0,)),
    "fast": (("hsv", "lab"), (ALL, ALL[1:]), (50.0, 100.0)),
    "quality": (("hsv", "lab", "rgi", "h", "i"), (ALL, ALL[1:], ("fill",), ("size",)), (50.0, 100.0, 150.0, 300.0)),
}
COLOR_BINS = 25
TEXTURE_BINS = 10
ORIENTATIONS = 8
SMOOTHING = 0.8  # of the image before superpixels are cut, as the authors of both papers set it
SEED = 0


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions, the likeliest objects first. boxes_R4: int64 x1, y1, x2, y2 in pixels, x2 and y2 outside.

    maps: superpixel numbers label_HW of the groupings that they come from. map_R: which of those a region belongs to;
    members: the numbers of its superpixels there.
    """

    boxes_R4: npt.NDArray[np.int64]
    maps: tuple[npt.NDArray[np.int32], ...]
    map_R: npt.NDArray[np.int64]
    members: tuple[npt.NDArray[np.int64], ...]

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """mask_HW of one region."""
        label_HW = self.maps[self.map_R[index]]
        inside_S = np.zeros(int(label_HW.max()) + 1, np.bool_)
        inside_S[self.members[index]] = True
        return np.asarray(inside_S[label_HW])


@dataclass(frozen=True, slots=True)
class Grouping:
    """A hierarchy: S superpixels, then S - 1 regions of two earlier ones each, the last of them the whole image.

    boxes_R4: of all 2 S - 1. parents_P2: which two the regions from S on were made of.
    """

    boxes_R4: npt.NDArray[np.int64]
    parents_P2: npt.NDArray[np.int64]

    def members(self, region: int) -> npt.NDArray[np.int64]:
        """Numbers of the superpixels of a region, ascending."""
        superpixels = len(self.boxes_R4) - len(self.parents_P2)
        found, waiting = [], [region]
        while waiting:
            one = waiting.pop()
            if one < superpixels:
                found.append(one)
            else:
                waiting.extend(self.parents_P2[one - superpixels].tolist())
        return np.array(sorted(found), np.int64)


def selective_search(
    image_HWC: npt.NDArray[np.uint8], *, mode: SearchMode = "fast", limit: int = 2000, min_size: int = 8
) -> Regions:
    """At most `limit` regions, without two of the same box; the same for the same image.

    image_HWC: uint8 RGB. mode: which groupings are combined, by the paper's names: `fast` has 8, `quality` 80, and
    `single` is the first of the fast ones. min_size: pixels that both sides of a box have at least, or the image if it
    has fewer; a superpixel has a quarter of its square. A region comes the earlier, the later it was made in its
    grouping, times a random number (section 3.3), which is drawn from a fixed seed. Raises ValueError for options that
    make no sense, ConfigError without the extra.
    """
    if mode not in get_args(SearchMode) or limit < 1 or min_size < 1:
        raise ValueError(
            f"mode must be one of {', '.join(get_args(SearchMode))}, limit and min_size 1 or more, "
            f"got {mode!r}, {limit}, {min_size}"
        )
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"expected uint8 RGB of H, W, 3, got {image_HWC.dtype} {image_HWC.shape}")
    segmentation = import_extra("skimage.segmentation", EXTRA)
    min_size = min(min_size, *image_HWC.shape[:2])
    spaces, similarities, thresholds = MODES[mode]
    draw = np.random.default_rng(SEED)
    maps: list[npt.NDArray[np.int32]] = []
    groupings: list[tuple[int, Grouping]] = []
    rank: list[tuple[float, int, int]] = []
    for space, threshold in itertools.product(spaces, thresholds):
        color_HWC = color_space(image_HWC, space)
        label_HW = segmentation.felzenszwalb(
            color_HWC, scale=threshold, sigma=SMOOTHING, min_size=max(1, min_size**2 // 4), channel_axis=-1
        ).astype(np.int32)
        maps.append(label_HW)
        features = _features(color_HWC, label_HW)
        for similarity in similarities:
            grouping = group(features, similarity)
            places = np.arange(len(grouping.boxes_R4), 0, -1)  # the whole image is 1
            order = draw.random(len(places)) * places
            rank += [(value, len(groupings), region) for region, value in enumerate(order.tolist())]
            groupings.append((len(maps) - 1, grouping))
    chosen: dict[tuple[int, ...], tuple[int, int]] = {}
    for _, at, region in sorted(rank):
        x1, y1, x2, y2 = groupings[at][1].boxes_R4[region].tolist()
        if min(x2 - x1, y2 - y1) >= min_size:
            chosen.setdefault((x1, y1, x2, y2), (at, region))
        if len(chosen) == limit:
            break
    return Regions(
        boxes_R4=np.array([*chosen], np.int64).reshape(-1, 4),
        maps=tuple(maps),
        map_R=np.array([groupings[at][0] for at, _ in chosen.values()], np.int64),
        members=tuple(groupings[at][1].members(region) for at, region in chosen.values()),
    )


def color_space(image_HWC: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.float64]:
    """uint8 RGB as `rgb`, `hsv`, `lab`, `rgi` (normalised red and green, and intensity), `h` or `i`, each 0 to 1."""
    rgb_HWC = image_HWC / 255.0
    if name == "rgb":
        return rgb_HWC
    if name in ("hsv", "h", "lab"):
        color = import_extra("skimage.color", EXTRA)
        if name == "lab":
            # L is 0 to 100, a and b of sRGB lie within -128 to 127.
            shift, size = np.array([0.0, 128.0, 128.0]), np.array([100.0, 255.0, 255.0])
            return np.asarray(np.clip((color.rgb2lab(rgb_HWC) + shift) / size, 0, 1))
        hsv_HWC: npt.NDArray[np.float64] = color.rgb2hsv(rgb_HWC)
        return hsv_HWC if name == "hsv" else hsv_HWC[:, :, :1]
    intensity_HW1 = rgb_HWC.mean(2, keepdims=True)
    if name == "i":
        return np.asarray(intensity_HW1)
    if name == "rgi":
        total_HW1 = np.maximum(rgb_HWC.sum(2, keepdims=True), 1e-12)
        return np.concatenate([rgb_HWC[:, :, :2] / total_HW1, intensity_HW1], 2)
    raise ValueError(f"colour space must be rgb, hsv, lab, rgi, h or i, got {name!r}")


@dataclass(frozen=True, slots=True)
class _Features:
    """Of superpixels, as whole numbers, so that what is merged is exactly the sum. color_SD, texture_SD: histograms of
    the values of all pixels and channels. boxes_S4. pairs: which touch (4 neighbours), each once, lower number first.
    """

    color_SD: npt.NDArray[np.int64]
    texture_SD: npt.NDArray[np.int64]
    size_S: npt.NDArray[np.int64]
    boxes_S4: npt.NDArray[np.int64]
    pairs_P2: npt.NDArray[np.int64]
    pixels: int


def _features(color_HWC: npt.NDArray[np.float64], label_HW: npt.NDArray[np.int32]) -> _Features:
    height, width = label_HW.shape
    count = int(label_HW.max()) + 1
    rows_HW, columns_HW = np.indices(label_HW.shape)
    boxes_S4 = np.tile(np.array([width, height, 0, 0], np.int64), (count, 1))
    for at, edge_HW in enumerate((columns_HW, rows_HW)):
        np.minimum.at(boxes_S4[:, at], label_HW, edge_HW)
        np.maximum.at(boxes_S4[:, at + 2], label_HW, edge_HW + 1)
    sides = [(label_HW[:, :-1], label_HW[:, 1:]), (label_HW[:-1], label_HW[1:])]
    pairs_P2 = np.concatenate([np.stack([one.ravel(), other.ravel()], 1) for one, other in sides]).astype(np.int64)
    pairs_P2 = np.unique(np.sort(pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]], 1), axis=0)
    return _Features(
        color_SD=_histograms(color_HWC, label_HW, count, COLOR_BINS),
        texture_SD=_histograms(_texture(color_HWC), label_HW, count, TEXTURE_BINS),
        size_S=np.bincount(label_HW.ravel(), minlength=count),
        boxes_S4=boxes_S4,
        pairs_P2=pairs_P2,
        pixels=height * width,
    )


def _texture(color_HWC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian derivatives (sigma 1) in 8 directions of each channel, rectified, over their maximum in the image:
    (H, W, 8 C), 0 to 1."""
    filters = import_extra("scipy.ndimage", EXTRA)
    turns = np.arange(ORIENTATIONS) * (2 * np.pi / ORIENTATIONS)
    found = []
    for channel_HW in np.moveaxis(color_HWC, 2, 0):
        dy_HW1 = filters.gaussian_filter(channel_HW, 1.0, order=(1, 0))[:, :, None]
        dx_HW1 = filters.gaussian_filter(channel_HW, 1.0, order=(0, 1))[:, :, None]
        found.append(np.maximum(np.cos(turns) * dx_HW1 + np.sin(turns) * dy_HW1, 0))
    texture_HWC = np.concatenate(found, 2)
    # What a filter leaves of an even surface is rounding, not texture.
    largest = texture_HWC.max((0, 1))
    return np.asarray(np.where(largest > 1e-9, texture_HWC / np.maximum(largest, 1e-9), 0.0))


def _histograms(
    values_HWC: npt.NDArray[np.float64], label_HW: npt.NDArray[np.int32], count: int, bins: int
) -> npt.NDArray[np.int64]:
    """(S, C * bins) of values from 0 to 1."""
    channels = values_HWC.shape[2]
    bin_HWC = np.minimum((values_HWC * bins).astype(np.int64), bins - 1) + np.arange(channels) * bins
    flat = label_HW.astype(np.int64)[:, :, None] * (channels * bins) + bin_HWC
    return np.bincount(flat.ravel(), minlength=count * channels * bins).reshape(count, channels * bins)


def group(features: Any, similarity: Similarity = ALL) -> Grouping:
    """Merge the two most similar neighbours until one region is left (algorithm 1).

    features: of superpixels, from `_features`. similarity: which of color, texture, size and fill are summed
    (section 3.2). Of equally similar pairs the one of the lowest numbers is merged. Superpixels that touch nothing
    stay alone.
    """
    superpixels = len(features.size_S)
    most = 2 * superpixels - 1
    color = _grown(features.color_SD, most)
    texture = _grown(features.texture_SD, most)
    size = _grown(features.size_S, most)
    boxes = _grown(features.boxes_S4, most)
    neighbours: list[set[int]] = [set() for _ in range(most)]
    for one, other in features.pairs_P2.tolist():
        neighbours[one].add(other)
        neighbours[other].add(one)

    def alike(one: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        total = np.zeros(len(others))
        if "color" in similarity:
            total += _intersection(color[one], color[others])
        if "texture" in similarity:
            total += _intersection(texture[one], texture[others])
        both = size[one] + size[others]
        if "size" in similarity:
            total += 1 - both / features.pixels
        if "fill" in similarity:
            low = np.minimum(boxes[one, :2], boxes[others, :2])
            high = np.maximum(boxes[one, 2:], boxes[others, 2:])
            total += 1 - ((high - low).prod(1) - both) / features.pixels
        return total

    def entries(one: int) -> Iterator[tuple[float, int, int]]:
        others = np.array(sorted(neighbours[one]), np.int64)
        if len(others):
            for other, value in zip(others.tolist(), alike(one, others).tolist(), strict=True):
                yield -value, min(one, other), max(one, other)

    heap = [entry for one in range(superpixels) for entry in entries(one) if entry[1] == one]
    heapq.heapify(heap)
    alive = np.ones(most, np.bool_)
    parents: list[tuple[int, int]] = []
    while heap:
        _, one, other = heapq.heappop(heap)
        if not (alive[one] and alive[other]):
            continue
        new = superpixels + len(parents)
        parents.append((one, other))
        alive[one] = alive[other] = False
        for values in (color, texture, size):
            values[new] = values[one] + values[other]
        boxes[new, :2] = np.minimum(boxes[one, :2], boxes[other, :2])
        boxes[new, 2:] = np.maximum(boxes[one, 2:], boxes[other, 2:])
        neighbours[new] = (neighbours[one] | neighbours[other]) - {one, other}
        for neighbour in neighbours[new]:
            neighbours[neighbour] -= {one, other}
            neighbours[neighbour].add(new)
        for entry in entries(new):
            heapq.heappush(heap, entry)
    count = superpixels + len(parents)
    return Grouping(boxes[:count], np.array(parents, np.int64).reshape(-1, 2))


def _grown(values: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    whole = np.zeros((length, *values.shape[1:]), np.int64)
    whole[: len(values)] = values
    return whole


def _intersection(one_D: npt.NDArray[np.int64], others_ND: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What two histograms, each over its sum, have in common."""
    shares_ND = others_ND / others_ND.sum(1, keepdims=True)
    return np.asarray(np.minimum(one_D / one_D.sum(), shares_ND).sum(1))
