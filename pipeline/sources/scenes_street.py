"""What stands in a synthetic street: lays out one scene from random numbers and paints it, far to near.

Sizes are metres. Painting order is the order of sight: at one pixel, of two upright things on the same side of the
camera the one nearer to the axis x = 0 is nearer, so walls along the street go first, and `_place` refuses a thing
whose order by distance would contradict that.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from pipeline.sources.scenes_props import PAINTS, Mood, Props
from pipeline.sources.scenes_render import CAR, PAVEMENT, PERSON, ROAD, VEGETATION, Camera, Canvas, Draw, Rgb

__all__ = ["paint_street"]

CLEAR = Mood((62, 120, 208), (186, 214, 240), (1.0, 1.0, 0.98), 0.25, 3, 0, True, (255, 250, 225))
CLOUDY = Mood((120, 150, 190), (200, 212, 224), (0.92, 0.93, 0.96), 0.3, 6, 0, True)
OVERCAST = Mood((150, 157, 168), (206, 209, 213), (0.8, 0.82, 0.85), 0.4, 4, 1, False)
GOLDEN = Mood((104, 150, 208), (250, 214, 158), (1.08, 0.96, 0.78), 0.35, 4, 1, True, (255, 236, 180))
DUSK = Mood((66, 62, 120), (240, 148, 104), (0.74, 0.6, 0.62), 0.35, 3, 3, True, (255, 190, 120))
NIGHT = Mood((8, 12, 32), (44, 46, 74), (0.36, 0.39, 0.52), 0.3, 1, 4, False, (235, 235, 220))
FOGGY = Mood((196, 201, 205), (218, 221, 223), (0.88, 0.89, 0.9), 0.8, 0, 1, False)
MOODS = (CLEAR, CLEAR, CLEAR, CLOUDY, CLOUDY, OVERCAST, OVERCAST, GOLDEN, GOLDEN, DUSK, NIGHT, FOGGY)

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
        self.props = Props(canvas, draw, mood, self.leaves)
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
        canvas.begin(VEGETATION, camera.frontal(end))
        top = camera.v(draw.uniform(2.6, 4.0), end)
        foot = max(camera.v(0, end), float(np.ceil(camera.horizon_v)))
        canvas.rect(0, top, canvas.width, foot, canvas.ink(draw.pick(self.leaves), 0.8))
        left = (0 - camera.center_u) * end / camera.focal
        right = (canvas.width - camera.center_u) * end / camera.focal
        x = left - draw.uniform(0, 8)
        while x < right:
            wide = draw.uniform(7, 14)
            if draw.chance(0.62):
                self.props.house(x, wide, end, draw.uniform(5, 17))
            x += wide + (draw.uniform(0, 5) if draw.chance(0.4) else 0)
        for _ in range(draw.integer(0, 5)):
            z = end - draw.uniform(0.2, 1.5)
            self.scenery.append((z, partial(self.props.tree, draw.uniform(left, right), z, draw.uniform(5, 9))))

    def _lots(self, side: int) -> None:
        """What lines one side of the street: a row of houses, villas behind lawns, or a park behind a hedge."""
        draw, kind = self.draw, self.kind[side]
        edge = self.lot[side] * side
        z = draw.uniform(0.8, 4)
        if kind == "park":
            hedge = draw.uniform(0.6, 1.3)
            if draw.chance(0.7):
                self.scenery.append((0.5, partial(self.props.hedge, side * (edge + 0.2), hedge, self.far)))
            for _ in range(draw.integer(5, 9)):
                x, z, tall = side * (edge + draw.uniform(2.5, 14)), draw.uniform(8, self.far), draw.uniform(4.5, 9)
                self.scenery.append((z, partial(self.props.tree, x, z, tall, 2.2)))
            return
        while z < self.far - 4:
            long = min(draw.uniform(6, 13), self.far - z)
            x = side * (edge if kind == "row" else edge + draw.uniform(2.5, 5))
            tall = draw.uniform(6, 19) if kind == "row" else draw.uniform(4.5, 8.5)
            self.scenery.append((z, partial(self.props.house, min(x, x + side * 11), 11, z, tall, x, long)))
            gap = draw.uniform(2, 5) if kind == "villas" or draw.chance(0.2) else 0.0
            middle = z + long + gap / 2
            if gap and middle < self.far - 0.5 and draw.chance(0.5):
                self.scenery.append((middle, partial(self.props.tree, x + side * 2, middle, draw.uniform(4, 7))))
            z += long + gap

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
                    self._add(z, partial(self.props.car_across, x, z))
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
                    self._add(z, partial(self.props.sign, x, z))
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
                self._add(z, partial(self.props.tree, x, z, tall, reach))
            z += pitch

    def _person_at(self, x: float, z: float) -> None:
        if z < self.end - 1 and self._place(x - 0.35, x + 0.35, z, z):
            self._add(z, partial(self.props.person, x, z))

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
                    self.props.car_end(at, z, draw.pick(PAINTS), draw.chance(0.5), 1.45, None)
                else:
                    self.props.figure(at + draw.uniform(-0.12, 0.12), z, draw.uniform(1.5, 1.9))

        self._add(z, paint)

    def _car(self, x: float, z: float, front: bool) -> None:
        """A car along the street, if there is room; `front` shows its headlights."""
        draw = self.draw
        van = draw.chance(0.15)
        tall, long = (draw.uniform(1.9, 2.3), 4.9) if van else (draw.uniform(1.38, 1.62), draw.uniform(3.7, 4.5))
        if z + long < self.end - 1 and self._place(x - 0.9, x + 0.9, z, z + long):
            color = draw.pick(PAINTS)
            self._add(z, partial(self.props.car_along, x, z, long, tall, color, front, van))


def _from_axis(x0: float, x1: float) -> float:
    return 0.0 if x0 < 0 < x1 else min(abs(x0), abs(x1))
