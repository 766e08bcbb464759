"""What stands in a synthetic street: lays out one scene from random numbers and paints it, far to near.

Sizes are metres. Painting order is the order of sight: at one pixel, of two upright things on the same side of the
camera the one nearer to the axis x = 0 is nearer, so walls along the street go first, and `_place` refuses a thing
whose order by distance would contradict that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.sources.scenes_render import (
    BUILDING,
    CAR,
    PAVEMENT,
    PERSON,
    ROAD,
    SIGN,
    VEGETATION,
    Camera,
    Canvas,
    Draw,
    Rgb,
)

__all__ = ["Mood", "paint_street"]


@dataclass(frozen=True, slots=True)
class Mood:
    """Light and weather: sky colours, light on surfaces, fog (share at 60 m), clouds, lit windows of 8, hard shadows."""

    zenith: Rgb
    horizon: Rgb
    tint: Rgb
    fog: float
    clouds: int
    lit: int
    shadows: bool
    disc: Rgb | None = None


CLEAR = Mood((62, 120, 208), (186, 214, 240), (1.0, 1.0, 0.98), 0.25, 3, 0, True, (255, 250, 225))
CLOUDY = Mood((120, 150, 190), (200, 212, 224), (0.92, 0.93, 0.96), 0.3, 6, 0, True)
OVERCAST = Mood((150, 157, 168), (206, 209, 213), (0.8, 0.82, 0.85), 0.4, 4, 1, False)
GOLDEN = Mood((104, 150, 208), (250, 214, 158), (1.08, 0.96, 0.78), 0.35, 4, 1, True, (255, 236, 180))
DUSK = Mood((66, 62, 120), (240, 148, 104), (0.74, 0.6, 0.62), 0.35, 3, 3, True, (255, 190, 120))
NIGHT = Mood((8, 12, 32), (44, 46, 74), (0.36, 0.39, 0.52), 0.3, 1, 4, False, (235, 235, 220))
FOGGY = Mood((196, 201, 205), (218, 221, 223), (0.88, 0.89, 0.9), 0.8, 0, 1, False)
MOODS = (CLEAR, CLEAR, CLEAR, CLOUDY, CLOUDY, OVERCAST, OVERCAST, GOLDEN, GOLDEN, DUSK, NIGHT, FOGGY)

WALLS: tuple[Rgb, ...] = (
    (176, 92, 70), (198, 166, 128), (214, 204, 186), (150, 146, 144), (206, 140, 96), (120, 84, 72), (222, 190, 120),
    (170, 186, 196), (188, 120, 116), (232, 226, 214), (132, 140, 128), (96, 104, 120),
)  # fmt: skip
GLASS: tuple[Rgb, ...] = ((58, 70, 86), (84, 104, 124), (40, 46, 56), (120, 146, 168))
PAINTS: tuple[Rgb, ...] = (
    (190, 34, 36), (36, 72, 160), (222, 222, 224), (28, 28, 32), (150, 154, 160), (226, 176, 40), (34, 104, 78),
    (96, 160, 200), (120, 30, 48), (232, 116, 40),
)  # fmt: skip
CLOTHES: tuple[Rgb, ...] = (
    (200, 40, 50), (40, 70, 150), (235, 235, 235), (40, 40, 46), (240, 190, 60), (60, 130, 80), (150, 90, 160),
    (230, 120, 60), (110, 150, 190), (120, 100, 80), (220, 150, 170),
)  # fmt: skip
SKIN: tuple[Rgb, ...] = ((236, 196, 166), (214, 166, 130), (164, 114, 82), (110, 74, 54))
HAIR: tuple[Rgb, ...] = ((40, 30, 24), (100, 64, 36), (196, 160, 96), (150, 146, 142), (20, 18, 20))
LEAVES: tuple[tuple[Rgb, ...], ...] = (
    ((74, 128, 52), (92, 146, 60), (60, 110, 56)),
    ((60, 104, 44), (84, 120, 48), (104, 132, 64)),
    ((150, 120, 40), (176, 96, 36), (112, 116, 48)),
    ((120, 164, 76), (140, 170, 90), (206, 158, 170)),
)
GRASS: tuple[Rgb, ...] = ((96, 142, 66), (112, 148, 70), (142, 138, 72), (110, 160, 84))


def paint_street(draw: Draw, width: int, height: int) -> tuple[Canvas, Rgb, float]:
    """One scene: the canvas, the fog's colour and its share at 60 m."""
    mood = draw.pick(MOODS)
    camera = Camera(
        focal=width * draw.uniform(0.75, 1.0),
        center_u=width * draw.uniform(0.34, 0.66),
        horizon_v=height * draw.uniform(0.38, 0.52),
        height=draw.uniform(1.3, 2.4),
    )
    light = draw.uniform(0.88, 1.08)
    tint = (mood.tint[0] * light, mood.tint[1] * light, mood.tint[2] * light)
    street = _Street(draw, Canvas(draw, camera, width, height, tint), mood)
    street.paint()
    return street.canvas, mood.horizon, mood.fog


class _Street:
    """The layout of one scene while it is painted."""

    def __init__(self, draw: Draw, canvas: Canvas, mood: Mood) -> None:
        self.draw, self.canvas, self.camera, self.mood = draw, canvas, canvas.camera, mood
        self.half = draw.uniform(3.2, 5.5)  # half the road's width
        self.road_x = draw.uniform(-1, 1) * (self.half + 0.6)
        self.end = draw.uniform(32, 56)
        self.crossing = draw.uniform(8, 12) if draw.chance(0.5) else 0.0  # width of the cross street at the end
        self.far = self.end - self.crossing
        self.leaves = draw.pick(LEAVES)
        self.grass = draw.pick(GRASS)
        # Edges by side (-1 left, 1 right): kerb and, beyond the pavement, the line where lots begin.
        self.kerb = {side: self.road_x + side * self.half for side in (-1, 1)}
        self.lot: dict[int, float] = {}
        self.kind: dict[int, str] = {}
        for side in (-1, 1):
            edge = self.kerb[side] + side * draw.uniform(1.8, 4.0)
            self.lot[side] = edge if edge * side > 1.6 else side * 1.6
            self.kind[side] = draw.pick(("row", "row", "row", "villas", "park"))
        self.standing: list[tuple[float, float, float, float]] = []
        self.scenery: list[tuple[float, Callable[[], None]]] = []
        self.things: list[tuple[float, Callable[[], None]]] = []

    def paint(self) -> None:
        self._sky()
        self._ground()
        self._backdrop()
        for side in (-1, 1):
            self._lots(side)
        self._populate()
        for layer in (self.scenery, self.things):
            for _z, paint in sorted(layer, key=lambda entry: -entry[0]):
                paint()

    # Surroundings

    def _sky(self) -> None:
        draw, canvas, mood = self.draw, self.canvas, self.mood
        share_H = np.minimum(canvas.v_H / self.camera.horizon_v, 1.0)
        packed_H = np.zeros(canvas.height, "<u4")
        for shift, top, low in zip((0, 8, 16), mood.zenith, mood.horizon, strict=True):
            packed_H |= (top + (low - top) * share_H).astype("<u4") << np.uint32(shift)
        canvas.color_HW[:] = packed_H[:, None]
        width, horizon = canvas.width, self.camera.horizon_v
        if mood.disc is not None and draw.chance(0.6):
            u, v, size = draw.uniform(0, width), horizon * draw.uniform(0.1, 0.7), width * draw.uniform(0.015, 0.035)
            canvas.ellipse(u, v, size, size, canvas.glow(mood.disc))
        for _ in range(draw.integer(0, mood.clouds)):
            u, v = draw.uniform(0, width), horizon * draw.uniform(0.05, 0.7)
            reach = width * draw.uniform(0.04, 0.1)
            # Clouds take the scene's light, but brighter than any surface.
            puff = canvas.ink((250, 250, 252), 0.96 if mood is not NIGHT else 0.5)
            shade = canvas.ink((241, 243, 247), 0.96 if mood is not NIGHT else 0.48)
            for _ in range(draw.integer(3, 5)):
                size = reach * draw.uniform(0.4, 0.8)
                canvas.leaves(u + reach * draw.uniform(-1, 1), v + reach * draw.uniform(-0.2, 0.15), size, size * 0.42,
                              puff, shade)  # fmt: skip
        canvas.face_HW[:] = 0
        canvas.objects[0].window = [0, canvas.height, 0, width]

    def _ground(self) -> None:
        """Road, pavement and lawns up to the end of the street; the rows beyond stay for the backdrop."""
        canvas, camera, draw = self.canvas, self.camera, self.draw
        plane = camera.level(0.0)
        faces = [canvas.begin(category, plane) for category in (ROAD, PAVEMENT, VEGETATION)]
        for painted in canvas.objects[-3:]:
            painted.window = [0, canvas.height, 0, canvas.width]
        canvas.grounds = 3
        r0, _ = canvas.span(camera.v(0, self.end), canvas.height, canvas.height)
        if r0 >= canvas.height:
            return
        z_H = (camera.focal * camera.height / (canvas.v_H[r0:] - camera.horizon_v))[:, None]
        x_HW = (canvas.u_W - camera.center_u) * z_H / camera.focal
        off_HW = np.abs(x_HW - self.road_x)
        cross_H = z_H > self.far + 2.5
        cross_H &= z_H < self.end - 2.5
        if not self.crossing:
            cross_H[:] = False
        road_HW = (off_HW < self.half) | cross_H
        lawn_HW = np.zeros_like(road_HW)
        for side in (-1, 1):
            if self.kind[side] != "row":
                lawn_HW |= x_HW * side > self.lot[side] * side
        lawn_HW &= ~(road_HW | (z_H > self.far))
        asphalt = draw.pick(((92, 92, 96), (78, 80, 86), (112, 110, 108), (100, 94, 90)))
        slabs = draw.pick(((176, 170, 162), (156, 156, 158), (190, 176, 156), (168, 150, 140)))
        face_HW = np.where(road_HW, np.uint16(faces[0]), np.uint16(faces[1]))
        face_HW[lawn_HW] = faces[2]
        color_HW = np.where(road_HW, np.uint32(canvas.ink(asphalt)), np.uint32(canvas.ink(slabs)))
        speckle_HW = (canvas.clump_HW[r0:] & 15) > 12
        color_HW[lawn_HW] = canvas.ink(self.grass)
        color_HW[lawn_HW & speckle_HW] = canvas.ink(self.grass, 0.86)
        color_HW[road_HW & speckle_HW] = canvas.ink(asphalt, 0.95)
        # Joints between slabs, only where they are wider than a pixel or so.
        near = int(np.count_nonzero(z_H < 12))
        if near:
            x_near, z_near = x_HW[-near:] * 1.25, z_H[-near:] * 1.25
            joint = (x_near - np.floor(x_near) < 0.06) | (z_near - np.floor(z_near) < 0.09)
            joint &= face_HW[-near:] == faces[1]
            color_HW[-near:][joint] = canvas.ink(slabs, 0.84)
        color_HW[(np.abs(off_HW - self.half - 0.1) < 0.1) & ~cross_H] = canvas.ink(slabs, 1.14)
        paint_HW = np.zeros_like(road_HW)
        style = draw.integer(0, 3)
        stretch = z_H * draw.uniform(0.14, 0.2)
        dashes = (stretch - np.floor(stretch) < 0.5) if style else (z_H > 0)
        if style < 3:
            paint_HW |= (off_HW < 0.09) & dashes
        if draw.chance(0.5):
            paint_HW |= np.abs(off_HW - self.half + 0.35) < 0.07
        if draw.chance(0.4):
            stripes = draw.uniform(7, 18)
            bars = off_HW * 1.0
            paint_HW |= (z_H > stripes) & (z_H < stripes + 3) & (bars - np.floor(bars) < 0.5) & (off_HW < self.half)
        paint_HW &= road_HW & ~cross_H
        color_HW[paint_HW] = canvas.ink((228, 226, 214))
        canvas.color_HW[r0:] = color_HW
        canvas.face_HW[r0:] = face_HW

    def _backdrop(self) -> None:
        """A hedge, houses and trees that close the street, so that no ray finds the ground beyond `end`."""
        canvas, camera, draw, end = self.canvas, self.camera, self.draw, self.end
        plane = camera.frontal(end)
        canvas.begin(VEGETATION, plane)
        top = camera.v(draw.uniform(2.6, 4.0), end)
        foot = max(camera.v(0, end), float(np.ceil(camera.horizon_v)))
        canvas.rect(0, top, canvas.width, foot, canvas.ink(draw.pick(self.leaves), 0.8))
        left = (0 - camera.center_u) * end / camera.focal
        right = (canvas.width - camera.center_u) * end / camera.focal
        x = left - draw.uniform(0, 8)
        while x < right:
            wide = draw.uniform(7, 14)
            if draw.chance(0.62):
                canvas.begin(BUILDING, plane)
                self._wall(x, wide, end, draw.uniform(5, 17))
            x += wide + (draw.uniform(0, 5) if draw.chance(0.4) else 0)
        for _ in range(draw.integer(0, 5)):
            z = end - draw.uniform(0.2, 1.5)
            self.scenery.append((z, self._later_tree(draw.uniform(left, right), z, draw.uniform(5, 9))))

    def _lots(self, side: int) -> None:
        """What lines one side of the street: a row of houses, villas behind lawns, or a park behind a hedge."""
        draw, kind = self.draw, self.kind[side]
        edge = self.lot[side] * side
        z = draw.uniform(0.8, 4)
        if kind == "park":
            hedge = draw.uniform(0.6, 1.3)
            if draw.chance(0.7):
                self.scenery.append((0.5, lambda: self._hedge(side, edge + 0.2, hedge)))
            for _ in range(draw.integer(5, 9)):
                x, z, tall = side * (edge + draw.uniform(2.5, 14)), draw.uniform(8, self.far), draw.uniform(4.5, 9)
                self.scenery.append((z, self._later_tree(x, z, tall, 2.2)))
            return
        while z < self.far - 4:
            long = min(draw.uniform(6, 13), self.far - z)
            x = side * (edge if kind == "row" else edge + draw.uniform(2.5, 5))
            tall = draw.uniform(6, 19) if kind == "row" else draw.uniform(4.5, 8.5)
            self.scenery.append((z, self._later_house(side, x, z, long, tall)))
            gap = draw.uniform(2, 5) if kind == "villas" or draw.chance(0.2) else 0.0
            middle = z + long + gap / 2
            if gap and middle < self.far - 0.5 and draw.chance(0.5):
                self.scenery.append((middle, self._later_tree(x + side * 2, middle, draw.uniform(4, 7))))
            z += long + gap

    def _hedge(self, side: int, edge: float, tall: float) -> None:
        canvas, camera, x = self.canvas, self.camera, side * edge
        canvas.begin(VEGETATION, camera.side(x))
        one = (camera.u(x, 1.0), camera.v(tall, 1.0), camera.v(0, 1.0))
        other = (camera.u(x, self.far), camera.v(tall, self.far), camera.v(0, self.far))
        canvas.receding(one, other, canvas.ink(self.leaves[0], 0.9))

    def _later_house(self, side: int, x: float, z: float, long: float, tall: float) -> Callable[[], None]:
        def paint() -> None:
            self.canvas.begin(BUILDING, self.camera.frontal(z))
            self._wall(min(x, x + side * 11), 11, z, tall, side_x=x, long=long)

        return paint

    def _wall(self, x: float, wide: float, z: float, tall: float, side_x: float = 0.0, long: float = 0.0) -> None:
        """A house: the front that faces the camera and, with `long`, the front along the street at `side_x`."""
        canvas, camera, draw = self.canvas, self.camera, self.draw
        look = _Facade(draw, canvas, self.mood, tall)
        top, foot = camera.v(tall, z), camera.v(0, z)
        r0, r1 = canvas.span(top, foot, canvas.height)
        c0, c1 = canvas.span(camera.u(x, z), camera.u(x + wide, z), canvas.width)
        if r0 < r1 and c0 < c1:
            along_W = (canvas.u_W[c0:c1] - camera.center_u) * (z / camera.focal) - x
            up_HW = (camera.height - (canvas.v_H[r0:r1] - camera.horizon_v) * (z / camera.focal))[:, None]
            look.paint(r0, r1, c0, c1, along_W, up_HW, 0.88)
        if not long:
            return
        canvas.face(camera.side(side_x))
        near_u, far_u = camera.u(side_x, z), camera.u(side_x, z + long)
        c0, c1 = canvas.span(min(near_u, far_u), max(near_u, far_u), canvas.width)
        r0, r1 = canvas.span(top, foot, canvas.height)
        if r0 < r1 and c0 < c1:
            z_W = camera.focal * side_x / (canvas.u_W[c0:c1] - camera.center_u)
            up_HW = camera.height - (canvas.v_H[r0:r1] - camera.horizon_v)[:, None] * (z_W / camera.focal)
            look.paint(r0, r1, c0, c1, z_W - z, up_HW, 1.0)

    def _later_tree(self, x: float, z: float, tall: float, reach: float = 9.0) -> Callable[[], None]:
        return partial(self._tree, x, z, tall, reach)

    def _tree(self, x: float, z: float, tall: float, reach: float = 9.0) -> None:
        canvas, camera, draw = self.canvas, self.camera, self.draw
        canvas.begin(VEGETATION, camera.frontal(z))
        scale = camera.focal / z
        u, foot = camera.u(x, z), camera.v(0, z)
        kind = draw.integer(0, 5)
        green = draw.pick(self.leaves)
        if self.mood.shadows:
            canvas.shadow(u + 0.6 * scale, foot, 1.6 * scale, 1.6 * scale * camera.height / z)
        trunk = (0.1 + tall * 0.015) * scale
        bark = canvas.ink((96, 74, 56), draw.uniform(0.8, 1.2))
        canvas.upright(
            (foot - 0.55 * tall * scale, u - 0.7 * trunk, u + 0.7 * trunk), (foot, u - trunk, u + trunk), bark
        )
        dark = canvas.ink(green, 0.72)
        if kind == 0:
            for step in range(3):
                half = min(0.24 * tall * (1 - 0.25 * step), reach) * scale
                base = foot - (0.14 + 0.26 * step) * tall * scale
                canvas.upright(
                    (base - 0.36 * tall * scale, u, u), (base, u - half, u + half), canvas.ink(green, 0.7 + 0.1 * step)
                )
            return
        if kind == 1:
            canvas.leaves(u, foot - 0.56 * tall * scale, min(0.14 * tall, reach) * scale, 0.44 * tall * scale,
                          canvas.ink(green, 0.9), dark)  # fmt: skip
            return
        spread = min(0.3 * tall, reach) * scale
        shapes = [(draw.uniform(0.55, 0.75), draw.uniform(-0.4, 0.4)) for _ in range(5)]
        for blob, (share, shift) in enumerate(shapes if scale * tall > 12 else [(1.0, 0.0)]):
            size, aside = spread * share, spread * shift
            rise = (0.58 + 0.07 * blob) * tall * scale
            canvas.leaves(u + aside, foot - rise, size, size * 0.85, canvas.ink(green, 0.82 + 0.07 * blob), dark)

    # Traffic

    def _place(self, x0: float, x1: float, z0: float, z1: float) -> bool:
        """Whether a thing may stand there: it touches nothing, and order by distance is order by sight (see top)."""
        for a0, a1, b0, b1 in self.standing:
            if z1 + 0.3 < b0 or b1 + 0.3 < z0:
                continue
            if x0 < a1 + 0.25 and a0 - 0.25 < x1:
                return False
            inner = _from_axis(x0, x1) < _from_axis(a0, a1)
            if x0 * a0 > 0 and (z0 > b0 if inner else b0 > z0):
                return False
        self.standing.append((x0, x1, z0, z1))
        return True

    def _populate(self) -> None:
        draw = self.draw
        busy = draw.uniform(0.3, 1.0)
        if draw.chance(0.3):
            self._crowd()
        if self.crossing:
            for _ in range(draw.integer(0, 2)):
                z, x = self.far + draw.uniform(3, max(3.1, self.crossing - 5)), draw.uniform(-12, 12)
                if self._place(x - 2.1, x + 2.1, z, z + 1.8):
                    self._add(z, partial(self._car_across, x, z))
        for lane in (-1, 1):
            if draw.chance(busy):
                x, z = self.road_x + lane * self.half * 0.45, draw.uniform(6.5, self.far - 6)
                if abs(x) > 0.9 or z > 9:
                    self._car(x, z, lane < 0)
            if draw.chance(0.5):
                x, z = self.kerb[lane] - lane * 1.05, draw.uniform(3, 12)
                while z < self.far - 5:
                    if draw.chance(0.65) and self.half > 3.8:
                        self._car(x, z, lane < 0)
                    z += draw.uniform(5.5, 7.5)
        for side in (-1, 1):
            walk = abs(self.lot[side] - self.kerb[side])
            if self.kind[side] == "row" and walk > 2.4 and draw.chance(0.5):
                self._avenue(side)
            for _ in range(draw.integer(0, 2)):
                x, z = self.kerb[side] + side * 0.5, draw.uniform(5, 20)
                if self._place(x - 0.1, x + 0.1, z, z):
                    self._add(z, partial(self._sign, x, z))
            for _ in range(draw.integer(0, 1 + int(4 * busy))):
                x = self.kerb[side] + side * draw.uniform(0.7, max(0.8, walk - 0.4))
                self._person_at(x, 4.5 + draw.uniform(0, 1) * draw.uniform(2, 26))
        if draw.chance(0.35):
            z = draw.uniform(7, 20)
            for _ in range(draw.integer(1, 3)):
                self._person_at(self.road_x + draw.uniform(-1, 1) * self.half, z + draw.uniform(0, 2))

    def _add(self, z: float, paint: Callable[[], None]) -> None:
        # Beyond the end of the houses only distance decides; houses may hide what crosses there.
        (self.scenery if z >= self.far else self.things).append((z, paint))

    def _avenue(self, side: int) -> None:
        draw = self.draw
        z, pitch = draw.uniform(6, 12), draw.uniform(7, 11)
        while z < self.far:
            x = self.kerb[side] + side * 0.9
            if self._place(x - 0.2, x + 0.2, z, z):
                tall = draw.uniform(4.5, 7.5)
                # A crown must not reach through the wall behind it.
                reach = max(abs(self.lot[side] - x) * 0.75, 0.5)
                self._add(z, self._later_tree(x, z, tall, reach))
            z += pitch

    def _person_at(self, x: float, z: float) -> None:
        if z < self.end - 1 and self._place(x - 0.35, x + 0.35, z, z):
            self._add(z, partial(self._person, x, z))

    def _crowd(self) -> None:
        """Persons (or parked cars) too far to tell apart: one crowd segment at one depth."""
        draw = self.draw
        cars = bool(self.crossing) and draw.chance(0.5)
        z = self.far + 2.8 if cars else self.far - draw.uniform(2, 6)
        x = self.road_x + draw.uniform(-1, 1) * (self.half - 1.5)
        count = draw.integer(5, 9)
        pitch = 2.3 if cars else 0.45
        half = count * pitch / 2
        if not self._place(x - half, x + half, z, z + (4 if cars else 0.5)):
            return

        def paint() -> None:
            self.canvas.begin(CAR if cars else PERSON, self.camera.frontal(z), crowd=True)
            for number in range(count):
                at = x - half + (number + 0.5) * pitch
                if cars:
                    self._car_end(at, z, draw.pick(PAINTS), draw.chance(0.5), 1.45, None)
                else:
                    self._figure(at + draw.uniform(-0.12, 0.12), z, draw.uniform(1.5, 1.9))

        self._add(z, paint)

    def _person(self, x: float, z: float) -> None:
        canvas, camera = self.canvas, self.camera
        scale = camera.focal / z
        aside = 0.5 if self.mood.shadows else 0.0
        canvas.shadow(
            camera.u(x, z) + aside * scale, camera.v(0, z), (0.3 + aside) * scale, 0.3 * scale * camera.height / z
        )
        canvas.begin(PERSON, camera.frontal(z))
        self._figure(x, z, self.draw.uniform(1.05, 1.35) if self.draw.chance(0.12) else self.draw.uniform(1.55, 1.92))

    def _figure(self, x: float, z: float, tall: float) -> None:
        canvas, camera, draw = self.canvas, self.camera, self.draw
        unit = tall * camera.focal / z  # pixels of the whole height
        u, foot = camera.u(x, z), camera.v(0, z)
        shirt, trousers, skin = draw.pick(CLOTHES), draw.pick(CLOTHES), draw.pick(SKIN)
        stride, turn = draw.uniform(0.02, 0.13), draw.uniform(0.75, 1.1)
        hair, skirt, bag = draw.pick(HAIR), draw.chance(0.2), draw.chance(0.25)

        def v(share: float) -> float:
            return foot - share * unit

        legs, shoe = canvas.ink(skin if skirt else trousers, 0.92), canvas.ink((48, 42, 40))
        for sign in (-1, 1):
            hip, toe = u + sign * 0.045 * unit, u + sign * (0.035 + stride) * unit
            canvas.upright(
                (v(0.5), hip - 0.05 * unit, hip + 0.05 * unit), (v(0.03), toe - 0.035 * unit, toe + 0.035 * unit), legs
            )
            canvas.rect(toe - 0.045 * unit, v(0.035), toe + 0.05 * unit, v(0), shoe)
            sleeve = u + sign * 0.125 * turn * unit
            hand = sleeve + sign * stride * 0.5 * unit
            canvas.upright((v(0.81), sleeve - 0.035 * unit, sleeve + 0.035 * unit), (v(0.47), hand - 0.028 * unit, hand + 0.028 * unit),
                           canvas.ink(shirt, 0.85))  # fmt: skip
        torso = 0.125 * turn * unit
        canvas.upright((v(0.83), u - torso, u + torso), (v(0.46), u - 0.8 * torso, u + 0.8 * torso), canvas.ink(shirt))
        if skirt:
            canvas.upright(
                (v(0.52), u - 0.7 * torso, u + 0.7 * torso),
                (v(0.28), u - 1.2 * torso, u + 1.2 * torso),
                canvas.ink(trousers),
            )
        if bag:
            canvas.rect(u + 0.9 * torso, v(0.62), u + 1.7 * torso, v(0.42), canvas.ink((120, 70, 40)))
        canvas.rect(u - 0.03 * unit, v(0.87), u + 0.03 * unit, v(0.82), canvas.ink(skin, 0.9))
        canvas.ellipse(u, v(0.935), 0.055 * unit, 0.068 * unit, canvas.ink(hair))
        canvas.ellipse(u, v(0.922), 0.045 * unit, 0.055 * unit, canvas.ink(skin))
        canvas.rect(u - 0.045 * unit, v(0.995), u + 0.045 * unit, v(0.95), canvas.ink(hair))

    def _car(self, x: float, z: float, front: bool) -> None:
        """A car along the street, if there is room; `front` shows its headlights."""
        draw = self.draw
        van = draw.chance(0.15)
        tall, long = (draw.uniform(1.9, 2.3), 4.9) if van else (draw.uniform(1.38, 1.62), draw.uniform(3.7, 4.5))
        if z + long < self.end - 1 and self._place(x - 0.9, x + 0.9, z, z + long):
            color = draw.pick(PAINTS)
            self._add(z, partial(self._car_along, x, z, long, tall, color, front, van))

    def _car_along(self, x: float, z: float, long: float, tall: float, color: Rgb, front: bool, van: bool) -> None:
        canvas, camera = self.canvas, self.camera
        scale = camera.focal / z
        canvas.shadow(camera.u(x, z + long / 2), camera.v(0, z + 0.6), 1.25 * scale, 1.3 * scale * camera.height / z)
        canvas.begin(CAR, camera.frontal(z))
        side = 1 if x > 0 else -1
        flank = x - side * 0.9
        if flank * side > 0:
            self._flank(flank, z, long, tall, color, van)
        if camera.height > 0.9:
            # The boot or bonnet between the end face and the windows, seen from above.
            canvas.face(camera.level(0.88))
            canvas.upright((camera.v(0.88, z + 0.7), camera.u(x - 0.9, z + 0.7), camera.u(x + 0.9, z + 0.7)),
                           (camera.v(0.88, z), camera.u(x - 0.9, z), camera.u(x + 0.9, z)), canvas.ink(color, 1.1))  # fmt: skip
        self._car_end(x, z, color, front, tall, 0.05 if van else 0.6)

    def _flank(self, x: float, z: float, long: float, tall: float, color: Rgb, van: bool) -> None:
        """The side of a car that the camera sees, in the plane at x."""
        canvas, camera = self.canvas, self.camera

        def edge(at: float, top: float, bottom: float) -> Rgb:
            return camera.u(x, z + at), camera.v(top, z + at), camera.v(bottom, z + at)

        canvas.face(camera.side(x))
        rear, nose = (0.0, long - 0.4) if van else (0.35, long - 1.1)
        slant = 0.15 if van else 0.5
        paint, glass = canvas.ink(color, 0.82), canvas.ink(GLASS[0])
        for a, b, low, high in ((rear, rear + slant, 0.88, tall), (nose, nose - slant, 0.88, tall)):
            canvas.receding(edge(a, low, 0.86), edge(b, high, 0.86), paint)
        canvas.receding(edge(rear + slant, tall, 0.86), edge(nose - slant, tall, 0.86), paint)
        canvas.receding(edge(rear + slant, tall - 0.12, 0.92), edge(nose - slant, tall - 0.12, 0.92), glass)
        canvas.receding(edge((rear + nose) / 2 - 0.06, tall, 0.86), edge((rear + nose) / 2 + 0.06, tall, 0.86), paint)
        canvas.receding(edge(0, 0.88, 0.24), edge(long, 0.82, 0.24), paint)
        canvas.receding(edge(0, 0.4, 0.24), edge(long, 0.4, 0.24), canvas.ink(color, 0.6))
        for at in (0.8, long - 0.8):
            u, v = camera.u(x, z + at), camera.v(0.32, z + at)
            half = abs(camera.u(x, z + at - 0.33) - camera.u(x, z + at + 0.33)) / 2
            tyre = 0.33 * camera.focal / (z + at)
            canvas.ellipse(u, v, half, tyre, canvas.ink((26, 26, 28)))
            canvas.ellipse(u, v, half * 0.5, tyre * 0.5, canvas.ink((150, 152, 156)))

    def _car_end(self, x: float, z: float, color: Rgb, front: bool, tall: float, inset: float | None) -> None:
        """The face of a car towards the camera; `inset` is how far back its windows stand, None for a flat crowd."""
        canvas, camera = self.canvas, self.camera

        def level(y: float, half: float, at: float) -> Rgb:
            return camera.v(y, at), camera.u(x - half, at), camera.u(x + half, at)

        back = z + (inset or 0.0)
        if inset is not None:
            canvas.face(camera.frontal(back))
        top_half = 0.84 if tall > 1.8 else 0.66
        canvas.upright(level(tall, top_half, back), level(0.86, 0.86, back), canvas.ink(color, 1.06))
        pane = level(tall - 0.14, top_half - 0.05, back), level(0.98, 0.74, back)
        canvas.upright(*pane, canvas.ink(GLASS[1] if front else GLASS[2]))
        if inset is not None:
            canvas.face(camera.frontal(z))
        canvas.upright(level(0.9, 0.86, z), level(0.3, 0.9, z), canvas.ink(color))
        canvas.upright(level(0.46, 0.9, z), level(0.26, 0.88, z), canvas.ink(color, 0.62))
        canvas.upright(level(0.62, 0.24, z), level(0.5, 0.24, z), canvas.ink((226, 224, 200)))
        for sign in (-1, 1):
            u0, u1 = camera.u(x + sign * 0.62, z), camera.u(x + sign * 0.88, z)
            lamp = (250, 246, 215) if front else (206, 28, 26)
            bright = self.mood.lit >= 3 or front
            canvas.rect(
                min(u0, u1),
                camera.v(0.78, z),
                max(u0, u1),
                camera.v(0.62, z),
                canvas.glow(lamp) if bright else canvas.ink(lamp),
            )
            t0, t1 = camera.u(x + sign * 0.6, z), camera.u(x + sign * 0.84, z)
            canvas.rect(min(t0, t1), camera.v(0.27, z), max(t0, t1), camera.v(0, z), canvas.ink((26, 26, 28)))

    def _car_across(self, x: float, z: float) -> None:
        """A car that crosses the end of the street, in profile."""
        canvas, camera, draw = self.canvas, self.camera, self.draw
        scale = camera.focal / z
        u, foot = camera.u(x, z), camera.v(0, z)
        color, way = draw.pick(PAINTS), draw.pick((-1, 1))
        canvas.shadow(u, foot, 2.2 * scale, 0.9 * scale * camera.height / z)
        canvas.begin(CAR, camera.frontal(z))

        def level(y: float, left: float, right: float) -> Rgb:
            ends = sorted((u + way * left * scale, u + way * right * scale))
            return foot - y * scale, ends[0], ends[1]

        canvas.upright(level(1.45, -1.1, 0.5), level(0.85, -1.7, 1.1), canvas.ink(color, 0.95))
        canvas.upright(level(1.36, -1.0, 0.42), level(0.92, -1.4, 0.9), canvas.ink(GLASS[1]))
        canvas.upright(level(1.45, -0.35, -0.25), level(0.85, -0.35, -0.25), canvas.ink(color, 0.95))
        canvas.upright(level(0.88, -2.05, 1.95), level(0.26, -2.0, 2.1), canvas.ink(color))
        for at in (-1.25, 1.3):
            canvas.ellipse(
                u + way * at * scale, foot - 0.32 * scale, 0.33 * scale, 0.33 * scale, canvas.ink((26, 26, 28))
            )
            canvas.ellipse(
                u + way * at * scale, foot - 0.32 * scale, 0.16 * scale, 0.16 * scale, canvas.ink((150, 152, 156))
            )

    def _sign(self, x: float, z: float) -> None:
        canvas, camera, draw = self.canvas, self.camera, self.draw
        canvas.begin(SIGN, camera.frontal(z))
        scale = camera.focal / z
        u, foot = camera.u(x, z), camera.v(0, z)
        tall, kind = draw.uniform(2.1, 2.9), draw.integer(0, 5)
        size = draw.uniform(0.34, 0.46) * scale
        v = foot - tall * scale
        # A pole thinner than a pixel would come and go between columns.
        pole = max(0.06 * scale, 0.5)
        canvas.rect(u - pole, v, u + pole, foot, canvas.ink((128, 130, 134)))
        red, white, blue = canvas.ink((214, 30, 34)), canvas.ink((244, 244, 240)), canvas.ink((26, 84, 180))
        black, yellow = canvas.ink((24, 24, 26)), canvas.ink((246, 200, 36))
        if kind == 0:
            canvas.ellipse(u, v, size, size, red)
            canvas.ellipse(u, v, 0.7 * size, 0.7 * size, white)
            canvas.rect(u - 0.3 * size, v - 0.3 * size, u + 0.3 * size, v + 0.3 * size, black)
        elif kind == 1:
            canvas.ellipse(u, v, size, size, red)
            canvas.rect(u - 0.65 * size, v - 0.18 * size, u + 0.65 * size, v + 0.18 * size, white)
        elif kind == 2:
            canvas.upright((v - size, u, u), (v + 0.9 * size, u - 1.1 * size, u + 1.1 * size), red)
            canvas.upright((v - 0.4 * size, u, u), (v + 0.65 * size, u - 0.6 * size, u + 0.6 * size), white)
        elif kind == 3:
            canvas.rect(u - 0.9 * size, v - 0.9 * size, u + 0.9 * size, v + 0.9 * size, blue)
            canvas.rect(u - 0.2 * size, v - 0.6 * size, u + 0.2 * size, v + 0.6 * size, white)
        elif kind == 4:
            canvas.upright((v - 1.1 * size, u, u), (v, u - 1.1 * size, u + 1.1 * size), yellow)
            canvas.upright((v, u - 1.1 * size, u + 1.1 * size), (v + 1.1 * size, u, u), yellow)
        else:
            canvas.rect(u - 1.9 * size, v - 0.8 * size, u + 1.9 * size, v + 0.8 * size, white)
            canvas.rect(u - 1.75 * size, v - 0.65 * size, u + 1.75 * size, v + 0.65 * size, canvas.ink((24, 120, 70)))
            canvas.rect(u - 1.3 * size, v - 0.12 * size, u + 0.9 * size, v + 0.12 * size, white)


def _from_axis(x0: float, x1: float) -> float:
    return 0.0 if x0 < 0 < x1 else min(abs(x0), abs(x1))


class _Facade:
    """The look of one house: wall, roof, windows by storey and bay, a shop or doors below."""

    def __init__(self, draw: Draw, canvas: Canvas, mood: Mood, tall: float) -> None:
        self.canvas, self.tall = canvas, tall
        self.wall, self.glass = draw.pick(WALLS), draw.pick(GLASS)
        self.roof_color = draw.pick(((110, 60, 50), (70, 72, 80), (96, 84, 76), self.wall))
        self.roof = draw.uniform(0.3, 1.6)
        self.storey, self.bay = draw.uniform(2.7, 3.4), draw.uniform(1.6, 3.2)
        self.sill, self.lintel = draw.uniform(0.22, 0.36), draw.uniform(0.72, 0.86)
        self.jamb = draw.uniform(0.14, 0.3)
        self.frames, self.shop = draw.chance(0.5), draw.chance(0.4)
        self.shop_color: Rgb = draw.pick(CLOTHES)
        self.lit_44 = np.array([[draw.integer(0, 7) < mood.lit for _ in range(4)] for _ in range(4)])
        self.dark_hours = mood.lit >= 3

    def paint(
        self,
        r0: int,
        r1: int,
        c0: int,
        c1: int,
        along_W: npt.NDArray[np.float64],
        up_HW: npt.NDArray[np.float64],
        shade: float,
    ) -> None:
        """Paint rows r0:r1 and columns c0:c1; along_W and up_HW are metres along the wall and above the ground."""
        canvas, top = self.canvas, self.tall - self.roof
        on_HW = np.broadcast_to((up_HW >= 0) & (up_HW < self.tall), (r1 - r0, c1 - c0))
        floor_HW, bay_W = np.floor(up_HW / self.storey), np.floor(along_W / self.bay)
        rise_HW, run_W = up_HW / self.storey - floor_HW, along_W / self.bay - bay_W
        upper_HW = (up_HW < top - 0.3) & (up_HW > (self.storey if self.shop else 0.0))
        color_HW = np.full((r1 - r0, c1 - c0), canvas.ink(self.wall, shade), np.uint32)
        if self.frames:
            color_HW[
                upper_HW & (rise_HW > self.sill - 0.05) & (rise_HW < self.lintel + 0.05)
                & (run_W > self.jamb - 0.06) & (run_W < 1.06 - self.jamb)
            ] = canvas.ink((236, 232, 222), shade)  # fmt: skip
        pane_HW = upper_HW & (rise_HW > self.sill) & (rise_HW < self.lintel)
        pane_HW = pane_HW & (run_W > self.jamb) & (run_W < 1 - self.jamb)
        color_HW[pane_HW] = canvas.ink(self.glass, shade)
        if self.lit_44.any():
            lit_HW = self.lit_44[floor_HW.astype(np.int32) & 3, bay_W.astype(np.int32) & 3] & pane_HW
            color_HW[lit_HW] = canvas.glow((250, 214, 130)) if self.dark_hours else canvas.ink((240, 222, 170), shade)
        if self.shop:
            front_HW = (up_HW > 0.4) & (up_HW < 2.2) & (run_W > 0.08) & (run_W < 0.92)
            color_HW[front_HW] = canvas.glow((206, 180, 120)) if self.dark_hours else canvas.ink(GLASS[1], shade)
            color_HW[np.broadcast_to((up_HW > 2.2) & (up_HW < 2.9), color_HW.shape)] = canvas.ink(
                self.shop_color, shade
            )
        color_HW[np.broadcast_to(up_HW > top, color_HW.shape)] = canvas.ink(self.roof_color, shade)
        where = canvas.touch(r0, r1, c0, c1)
        canvas.color_HW[where][on_HW] = color_HW[on_HW]
        canvas.face_HW[where][on_HW] = canvas._face
