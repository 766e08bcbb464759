"""What one thing in a synthetic street looks like: houses, trees, persons, cars and signs, each painted where told.

Sizes are metres, u and v pixels; x, z say where a thing stands on the ground (see scenes_render).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.sources.scenes_render import BUILDING, CAR, PERSON, SIGN, VEGETATION, Camera, Canvas, Draw, Rgb

__all__ = ["PAINTS", "Mood", "Props"]


@dataclass(frozen=True, slots=True)
class Mood:
    """Light and weather: sky and surface light, fog (share at 60 m), most clouds, lit windows of 8, shadows, sun."""

    zenith: Rgb
    horizon: Rgb
    tint: Rgb
    fog: float
    clouds: int
    lit: int
    shadows: bool
    disc: Rgb | None = None


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


@dataclass(frozen=True, slots=True)
class Props:
    """Paints things on one canvas under one light. leaves: the season's greens."""

    canvas: Canvas
    draw: Draw
    mood: Mood
    leaves: Sequence[Rgb]

    @property
    def camera(self) -> Camera:
        return self.canvas.camera

    def hedge(self, x: float, tall: float, far: float) -> None:
        """Along the street at x, from beside the camera to z = far."""
        canvas, camera = self.canvas, self.camera
        canvas.begin(VEGETATION, camera.side(x))
        one = (camera.u(x, 1.0), camera.v(tall, 1.0), camera.v(0, 1.0))
        other = (camera.u(x, far), camera.v(tall, far), camera.v(0, far))
        canvas.receding(one, other, canvas.ink(self.leaves[0], 0.9))

    def house(self, x: float, wide: float, z: float, tall: float, side_x: float = 0.0, long: float = 0.0) -> None:
        """A house: the front that faces the camera and, with `long`, the front along the street at `side_x`."""
        canvas, camera = self.canvas, self.camera
        canvas.begin(BUILDING, camera.frontal(z))
        look = _Facade(self.draw, canvas, self.mood, tall)
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

    def tree(self, x: float, z: float, tall: float, reach: float = 9.0) -> None:
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

    def person(self, x: float, z: float) -> None:
        canvas, camera = self.canvas, self.camera
        scale = camera.focal / z
        aside = 0.5 if self.mood.shadows else 0.0
        canvas.shadow(
            camera.u(x, z) + aside * scale, camera.v(0, z), (0.3 + aside) * scale, 0.3 * scale * camera.height / z
        )
        canvas.begin(PERSON, camera.frontal(z))
        self.figure(x, z, self.draw.uniform(1.05, 1.35) if self.draw.chance(0.12) else self.draw.uniform(1.55, 1.92))

    def figure(self, x: float, z: float, tall: float) -> None:
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
            canvas.upright(
                (v(0.81), sleeve - 0.035 * unit, sleeve + 0.035 * unit),
                (v(0.47), hand - 0.028 * unit, hand + 0.028 * unit),
                canvas.ink(shirt, 0.85),
            )
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

    def car_along(self, x: float, z: float, long: float, tall: float, color: Rgb, front: bool, van: bool) -> None:
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
            canvas.upright(
                (camera.v(0.88, z + 0.7), camera.u(x - 0.9, z + 0.7), camera.u(x + 0.9, z + 0.7)),
                (camera.v(0.88, z), camera.u(x - 0.9, z), camera.u(x + 0.9, z)),
                canvas.ink(color, 1.1),
            )
        self.car_end(x, z, color, front, tall, 0.05 if van else 0.6)

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

    def car_end(self, x: float, z: float, color: Rgb, front: bool, tall: float, inset: float | None) -> None:
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

    def car_across(self, x: float, z: float) -> None:
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

    def sign(self, x: float, z: float) -> None:
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
        along_W: npt.NDArray[Any],
        up_HW: npt.NDArray[Any],
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
        canvas.face_HW[where][on_HW] = canvas.current
