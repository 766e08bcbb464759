"""Paints one synthetic street scene onto a canvas whose every pixel knows its surface.

Every surface is a plane, and the inverse depth of a plane is affine in pixel coordinates (Hartley and Zisserman,
Multiple View Geometry, 2nd ed., section 6.2), so three numbers per face give exact metric depth for all its pixels.

Pictures must be the same on every machine: random numbers are raw PCG64 words (whose stream numpy guarantees, which it
does not for its distributions), and arithmetic is limited to what IEEE 754 rounds exactly.

Axes: H rows (v, down), W columns (u, right). World, in metres: x right, y up from the ground, z forward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["BUILDING", "CAR", "PAVEMENT", "PERSON", "ROAD", "SIGN", "SKY", "VEGETATION", "Camera", "Canvas", "Draw"]

SKY, BUILDING, ROAD, PAVEMENT, VEGETATION, CAR, PERSON, SIGN = range(8)
Rgb = tuple[float, float, float]
Item = TypeVar("Item")


class Draw:
    """Random numbers of one scene, from raw 64-bit words."""

    def __init__(self, seed: int, index: int) -> None:
        # Layout and texture have a stream each, so that a scene is the same place at every size.
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, index, 0]))
        self._texture = np.random.PCG64(np.random.SeedSequence([seed, index, 1]))
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = self._bits.random_raw(512).tolist()
        return self._words.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + self._word() % (high - low + 1)

    def chance(self, share: float) -> bool:
        return self.uniform(0, 1) < share

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self._word() % len(items)]

    def plane(self, rows: int, columns: int) -> npt.NDArray[np.uint8]:
        """Independent bytes, (rows, columns)."""
        words = self._texture.random_raw((rows * columns + 7) // 8).astype("<u8")
        return words.view(np.uint8)[: rows * columns].reshape(rows, columns)


@dataclass(frozen=True, slots=True)
class Camera:
    """A level pinhole. focal, center_u and horizon_v in pixels; height above the ground in metres."""

    focal: float
    center_u: float
    horizon_v: float
    height: float

    def u(self, x: float, z: float) -> float:
        return self.center_u + self.focal * x / z

    def v(self, y: float, z: float) -> float:
        return self.horizon_v + self.focal * (self.height - y) / z

    def frontal(self, z: float) -> Rgb:
        """Inverse depth (per column, per row, constant) of the plane that faces the camera at z."""
        return (0.0, 0.0, 1 / z)

    def side(self, x: float) -> Rgb:
        """The same for the upright plane along the street at x."""
        slope = 1 / (self.focal * x)
        return (slope, 0.0, -self.center_u * slope)

    def level(self, y: float) -> Rgb:
        """The same for the horizontal plane at height y."""
        slope = 1 / (self.focal * (self.height - y))
        return (0.0, slope, -self.horizon_v * slope)


@dataclass(slots=True)
class Painted:
    """One object as painted: its class and the pixel window (top, bottom, left, right) that it may cover."""

    category: int
    crowd: bool = False
    window: list[int] = field(default_factory=lambda: [1 << 30, 0, 1 << 30, 0])


class Canvas:
    """Colour and face of every pixel; what is painted later lies in front.

    color_HW: packed r + 256 g + 65536 b, little endian, so that one store paints a pixel.
    face_HW: index into `planes` (inverse depth) and `owner` (index into `objects`); face 0 is the sky.
    current: the face that is being painted.
    """

    def __init__(self, draw: Draw, camera: Camera, width: int, height: int, tint: Rgb) -> None:
        self.camera, self.width, self.height, self.tint = camera, width, height, tint
        self.u_W = np.arange(width) + 0.5
        self.v_H = np.arange(height) + 0.5
        self.color_HW = np.zeros((height, width), "<u4")
        self.face_HW = np.zeros((height, width), np.uint16)
        self.planes: list[Rgb] = [(0.0, 0.0, 0.0)]
        self.owner: list[int] = [0]
        self.objects = [Painted(SKY)]
        self.grounds = 0  # faces 1 to `grounds` lie on the ground and take shadows
        # Leaves and clouds are clumps of about 1/100 of the width, whatever the resolution.
        clump = max(1, (width + 64) // 128)
        clumps = draw.plane(-(-height // clump), -(-width // clump))
        self.clump_HW = clumps if clump == 1 else clumps.repeat(clump, 0).repeat(clump, 1)[:height, :width]
        self.current = 0

    def ink(self, color: Rgb, shade: float = 1.0) -> int:
        """A surface colour under the scene's light, packed."""
        red, green, blue = (min(int(part * light * shade), 255) for part, light in zip(color, self.tint, strict=True))
        return red | green << 8 | blue << 16

    @staticmethod
    def glow(color: Rgb) -> int:
        """A colour that needs no light, packed."""
        return int(color[0]) | int(color[1]) << 8 | int(color[2]) << 16

    def begin(self, category: int, plane: Rgb, crowd: bool = False) -> int:
        """Start an object; what follows belongs to it."""
        self.objects.append(Painted(category, crowd))
        return self.face(plane)

    def face(self, plane: Rgb) -> int:
        """Start another face of the object."""
        self.planes.append(plane)
        self.owner.append(len(self.objects) - 1)
        self.current = len(self.planes) - 1
        return self.current

    def span(self, low: float, high: float, size: int) -> tuple[int, int]:
        """The pixels whose centre lies in [low, high)."""
        return max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), size)

    def touch(self, top: int, bottom: int, left: int, right: int) -> tuple[slice, slice]:
        window = self.objects[-1].window
        window[0], window[1] = min(window[0], top), max(window[1], bottom)
        window[2], window[3] = min(window[2], left), max(window[3], right)
        return slice(top, bottom), slice(left, right)

    def rect(self, left: float, top: float, right: float, bottom: float, color: int) -> None:
        r0, r1 = self.span(top, bottom, self.height)
        c0, c1 = self.span(left, right, self.width)
        if r0 < r1 and c0 < c1:
            where = self.touch(r0, r1, c0, c1)
            self.color_HW[where] = color
            self.face_HW[where] = self.current

    def ellipse(self, u: float, v: float, ru: float, rv: float, color: int) -> None:
        r0, r1 = self.span(v - rv, v + rv, self.height)
        c0, c1 = self.span(u - ru, u + ru, self.width)
        if r0 >= r1 or c0 >= c1:
            return
        across = (self.u_W[c0:c1] - u) / ru
        down = (self.v_H[r0:r1] - v) / rv
        self.fill(r0, r1, c0, c1, (across * across) + (down * down)[:, None] <= 1, color)

    def leaves(self, u: float, v: float, ru: float, rv: float, color: int, dark: int) -> None:
        """An ellipse with a ragged edge in two colours."""
        r0, r1 = self.span(v - 1.12 * rv, v + 1.12 * rv, self.height)
        c0, c1 = self.span(u - 1.12 * ru, u + 1.12 * ru, self.width)
        if r0 >= r1 or c0 >= c1:
            return
        across = (self.u_W[c0:c1] - u) / ru
        down = (self.v_H[r0:r1] - v) / rv
        clump = self.clump_HW[r0:r1, c0:c1]
        inside = (across * across) + (down * down)[:, None] <= 0.75 + clump / 512
        self.fill(r0, r1, c0, c1, inside, color)
        self.color_HW[r0:r1, c0:c1][inside & ((clump & 7) > 4)] = dark

    def upright(self, top: Rgb, bottom: Rgb, color: int) -> None:
        """A quadrilateral with level top and bottom, each (v, left u, right u)."""
        r0, r1 = self.span(top[0], bottom[0], self.height)
        c0, c1 = self.span(min(top[1], bottom[1]), max(top[2], bottom[2]), self.width)
        if r0 >= r1 or c0 >= c1:
            return
        along = (self.v_H[r0:r1] - top[0]) / (bottom[0] - top[0])
        left = (top[1] + (bottom[1] - top[1]) * along)[:, None]
        right = (top[2] + (bottom[2] - top[2]) * along)[:, None]
        u_W = self.u_W[c0:c1]
        self.fill(r0, r1, c0, c1, (u_W >= left) & (u_W < right), color)

    def receding(self, one: Rgb, other: Rgb, color: int) -> None:
        """A quadrilateral with upright left and right edges, each (u, top v, bottom v)."""
        first, last = (one, other) if one[0] <= other[0] else (other, one)
        c0, c1 = self.span(first[0], last[0], self.width)
        r0, r1 = self.span(min(one[1], other[1]), max(one[2], other[2]), self.height)
        if r0 >= r1 or c0 >= c1:
            return
        along = (self.u_W[c0:c1] - first[0]) / (last[0] - first[0])
        top = first[1] + (last[1] - first[1]) * along
        bottom = first[2] + (last[2] - first[2]) * along
        v_H = self.v_H[r0:r1, None]
        self.fill(r0, r1, c0, c1, (v_H >= top) & (v_H < bottom), color)

    def fill(self, r0: int, r1: int, c0: int, c1: int, inside_HW: npt.NDArray[np.bool_], color: int) -> None:
        where = self.touch(r0, r1, c0, c1)
        self.color_HW[where][inside_HW] = color
        self.face_HW[where][inside_HW] = self.current

    def shadow(self, u: float, v: float, ru: float, rv: float) -> None:
        """Darken an ellipse where it falls on the ground; labels stay."""
        r0, r1 = self.span(v - rv, v + rv, self.height)
        c0, c1 = self.span(u - ru, u + ru, self.width)
        if r0 >= r1 or c0 >= c1:
            return
        across = (self.u_W[c0:c1] - u) / ru
        down = (self.v_H[r0:r1] - v) / rv
        face = self.face_HW[r0:r1, c0:c1]
        inside = ((across * across) + (down * down)[:, None] <= 1) & (face >= 1) & (face <= self.grounds)
        color = self.color_HW[r0:r1, c0:c1]
        # Minus 3/8 in all three packed channels at once.
        lit = color[inside]
        color[inside] = lit - ((lit >> 2) & 0x3F3F3F) - ((lit >> 3) & 0x1F1F1F)

    def depth(self) -> npt.NDArray[np.float32]:
        """Metres, (H, W) float32; 0 on the sky."""
        planes = np.array(self.planes)
        face_HW = self.face_HW
        inverse = planes[:, 0][face_HW] * self.u_W
        inverse += planes[:, 1][face_HW] * self.v_H[:, None]
        inverse += planes[:, 2][face_HW]
        sky = face_HW == 0
        inverse[sky] = 1.0
        depth_HW: npt.NDArray[np.float32] = (1.0 / inverse).astype(np.float32)
        depth_HW[sky] = 0
        return depth_HW

    def image(self, draw: Draw, depth_HW: npt.NDArray[np.float32], fog: Rgb, fog_share: float) -> npt.NDArray[np.uint8]:
        """The finished picture, (H, W, 3) uint8: fog by depth (`fog_share` of it at 60 m) and sensor noise."""
        noise = draw.plane(self.height, self.width * 4).reshape(self.height, self.width, 4)
        color = self.color_HW.view(np.uint8).reshape(self.height, self.width, 4).astype(np.uint16)
        veil_HW = np.minimum(depth_HW * np.float32(fog_share * 256 / 60), np.float32(256)).astype(np.uint16)
        color *= (np.uint16(256) - veil_HW)[:, :, None]
        color += np.array([*(int(part) for part in fog), 0], np.uint16) * veil_HW[:, :, None]
        color >>= 8
        color += noise & 7
        color += (noise >> 3) & 3
        np.clip(color, 5, 260, out=color)
        color -= 5
        return np.ascontiguousarray(color[:, :, :3], dtype=np.uint8)
