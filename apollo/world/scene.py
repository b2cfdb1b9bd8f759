"""The micro world's scenes: what exists, where it is at every moment, and what happens.

A scene is plain data. Its *tracks* (position, scale, colour, visibility, camera) say what every
pixel shows and are all that `render.py` and `check.py` read; its *events* name what was planned
("the circle grows") and are what `language.py` and `questions.py` speak about. The two are kept
apart so that an independent checker can recompute every answer from the tracks alone.

Time is cut into beats (2 s; longer in videos over 40 s) and an event fits inside one beat. In most
scenes the beats begin at zero, so that a clip of the default sampling (4 frames over 2 s) sees a
whole event; in the others they are shifted and events straddle clips. Next: `render.py` (pixels),
`language.py` (words).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 230, 60),
    "green": (50, 190, 60),
    "cyan": (60, 220, 225),
    "blue": (50, 90, 235),
    "pink": (245, 130, 200),
    "white": (245, 245, 245),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 18),
    "grey": (100, 100, 104),
    "brown": (92, 60, 34),
    "navy": (22, 28, 84),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
LANDMARKS = ("arch", "tree", "house", "tower", "lamp", "well", "flag", "bridge")
TEXTURES = ("plain", "striped", "dotted")
WORDS = tuple(
    "ant bee box bus cat cow cup dog egg fan fox gum hat hen ice jam key leg map net "
    "owl pen pig rat sun tea van web yak zip".split()
)
DIGITS = tuple("0123456789")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
FRAME_RATES = (8.0, 12.0, 24.0, 25.0, 30000 / 1001, 30.0)
RADIUS = {"small": 0.10, "big": 0.16}
"""Radius of a thing as a share of the picture's width; 0.13 separates the two names."""

ROTATABLE = ("square", "triangle", "star", "cross", "heart")
BEAT_S = 2.0
GRID = 3
LEG_LENGTH = 0.8
"""Distance of one camera leg, in picture widths."""


@dataclass
class Thing:
    """Something that can be seen: a shape, a landmark or a sign.

    Tracks are lists of keyframes `[t_s, value...]`, linear between keyframes (`colours`: a step).
    `position` is in picture widths on the map, whose origin is the upper left corner of the first
    view, and so is `spread`, how far the halves of a split shape stand from its centre; `scale`
    multiplies `RADIUS`; `angle` is in degrees. `visible` lists stretches `[start_s, end_s]`.
    """

    id: int
    kind: str
    name: str
    colour: str
    size: str = "small"
    texture: str = "plain"
    visible: list[list[float]] = field(default_factory=list)
    position: list[list[float]] = field(default_factory=list)
    scale: list[list[float]] = field(default_factory=lambda: [[0.0, 1.0]])
    angle: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0]])
    spread: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0]])
    colours: list[list] = field(default_factory=list)

    @property
    def changes_colour(self) -> bool:
        """Whether its colour is not the same throughout."""
        return len(self.colours) > 1

    @property
    def label(self) -> str:
        """How a question names it: by shape alone if its colour changes."""
        return self.name if self.changes_colour else f"{self.colour} {self.name}"


@dataclass
class Event:
    """Something that happens from `start_s` to `end_s`.

    `thing` (who acts) and `other` (what is hit) are ids; -1 stands for none, or for the camera.
    """

    kind: str
    start_s: float
    end_s: float
    thing: int = -1
    other: int = -1
    value: str = ""

    @property
    def middle_s(self) -> float:
        """Middle of the event in seconds."""
        return (self.start_s + self.end_s) / 2


@dataclass
class Scene:
    """One video of the micro world, before it has pixels.

    `camera` is the track `[t_s, x, y]` of the view's upper left corner, in picture widths.
    """

    index: int
    seed: int
    genre: str
    duration_s: float
    source_fps: float
    variable_rate: bool
    beat_s: float
    phase_s: float
    ground: str
    specks: int
    things: list[Thing]
    events: list[Event]
    camera: list[list[float]]

    @property
    def shapes(self) -> list[Thing]:
        """The things that are plain shapes."""
        return [thing for thing in self.things if thing.kind == "shape"]

    def of_kind(self, *kinds: str) -> list[Event]:
        """Events of these kinds in order of time."""
        return [event for event in self.events if event.kind in kinds]


def at(track: list[list[float]], t: float) -> np.ndarray:
    """Value (D,) of a linear track at `t` seconds; held before its first key and after its last."""
    times = [key[0] for key in track]
    return np.array([np.interp(t, times, column) for column in list(zip(*track, strict=True))[1:]])


def colour_at(thing: Thing, t: float) -> str:
    """Colour name of a thing at `t` seconds."""
    name = thing.colour
    for start, colour in thing.colours:
        if t >= start:
            name = colour
    return name


def is_visible(thing: Thing, t: float) -> bool:
    """Whether the thing is switched on at `t` seconds (it may still be outside the view)."""
    return any(start <= t < end for start, end in thing.visible)


def size_at(thing: Thing, t: float) -> str:
    """ "small" or "big" at `t` seconds."""
    return "big" if RADIUS[thing.size] * at(thing.scale, t)[0] > 0.13 else "small"


def place_of(x: float, y: float) -> str:
    """Name of the cell of a 3 x 3 grid over the view that holds the point (picture widths)."""
    row = ROWS[int(np.clip(y * GRID, 0, GRID - 1))]
    column = COLUMNS[int(np.clip(x * GRID, 0, GRID - 1))]
    if row == column:
        return "centre"
    return " ".join(word for word in (row, column) if word != "middle")


class _Stage:
    """Plans the events of one scene beat by beat, keeping the tracks in step."""

    def __init__(self, rng: np.random.Generator, duration_s: float, beat_s: float, phase_s: float):
        self.rng, self.duration_s, self.beat_s, self.phase_s = rng, duration_s, beat_s, phase_s
        self.num_beats = int((duration_s - phase_s) // beat_s)
        self.things: list[Thing] = []
        self.events: list[Event] = []
        # thing id -> (column, row) that it occupies now
        self.cells: dict[int, tuple[int, int]] = {}
        self.done: set[tuple[int, str]] = set()

    def choose(self, values):
        return values[int(self.rng.integers(len(values)))]

    def span(self, beat: int, shortest: float = 0.55, longest: float = 0.85) -> tuple[float, float]:
        """A stretch inside the beat, off its edges by at least a twentieth of it."""
        length = self.rng.uniform(shortest, longest)
        start = beat + self.rng.uniform(0.05, 0.95 - length)
        return (
            round(self.phase_s + start * self.beat_s, 3),
            round(self.phase_s + (start + length) * self.beat_s, 3),
        )

    def log(self, kind: str, start: float, end: float, thing=-1, other=-1, value="") -> None:
        self.events.append(Event(kind, start, end, thing, other, value))

    # -- shapes --------------------------------------------------------------------------------

    def free_cells(self) -> list[tuple[int, int]]:
        taken = set(self.cells.values())
        return [(c, r) for c in range(GRID) for r in range(GRID) if (c, r) not in taken]

    def xy(self, cell: tuple[int, int], jitter: float = 0.02) -> list[float]:
        centre = (np.array(cell) + 0.5) / GRID + self.rng.uniform(-jitter, jitter, 2)
        return [round(float(v), 3) for v in np.clip(centre, 0.15, 0.85)]

    def add_shape(self) -> Thing:
        names = [s for s in SHAPES if s not in {t.name for t in self.things}]
        colours = [c for c in COLOURS if c not in self.used_colours()]
        cell = self.choose(self.free_cells())
        thing = Thing(
            id=len(self.things),
            kind="shape",
            name=self.choose(names),
            colour=self.choose(colours),
            size=self.choose(("small", "big")),
            texture=self.choose(TEXTURES),
        )
        thing.colours = [[0.0, thing.colour]]
        thing.position = [[0.0, *self.xy(cell)]]
        thing.visible = [[0.0, self.duration_s + 1]]
        self.things.append(thing)
        self.cells[thing.id] = cell
        return thing

    def used_colours(self) -> set[str]:
        shapes = (t for t in self.things if t.kind == "shape")
        return {colour for t in shapes for _, colour in (t.colours or [[0, t.colour]])}

    def move(self, thing: Thing, cell: tuple[int, int], start: float, end: float) -> None:
        before = thing.position[-1][1:]
        thing.position += [[start, *before], [end, *self.xy(cell)]]
        self.cells[thing.id] = cell

    def is_here(self, thing: Thing, beat: int) -> bool:
        """Whether the thing has appeared before this beat."""
        return thing.visible[0][0] < self.phase_s + beat * self.beat_s

    def neighbour(self, cell: tuple[int, int], direction: str) -> tuple[int, int] | None:
        """The cell next to this one, None outside the grid."""
        dx, dy = DIRECTIONS[direction]
        column, row = cell[0] + dx, cell[1] + dy
        return (column, row) if 0 <= column < GRID and 0 <= row < GRID else None

    def act(self, thing: Thing, kind: str, beat: int) -> bool:
        """Let the thing do this in the beat; False if it cannot."""
        once = kind in ("grows", "shrinks", "turns", "splits", "appears", "leaves")
        if thing.id not in self.cells or (thing.id, "splits") in self.done:
            return False
        if once and (thing.id, kind) in self.done:
            return False
        if not getattr(self, f"_{kind}")(thing, beat):
            return False
        self.done.add((thing.id, kind))
        return True

    def _moves(self, thing: Thing, beat: int) -> bool:
        free = set(self.free_cells())
        cell = self.cells[thing.id]
        ways = [d for d in DIRECTIONS if self.neighbour(cell, d) in free]
        if not ways:
            return False
        direction = self.choose(ways)
        pace = self.choose(("slowly", "quickly"))
        start, end = self.span(beat, *((0.2, 0.3) if pace == "quickly" else (0.8, 0.88)))
        target = self.neighbour(cell, direction)
        assert target is not None
        self.move(thing, target, start, end)
        self.log("moves", start, end, thing.id, value=f"{direction} {pace}")
        return True

    def _hits(self, thing: Thing, beat: int) -> bool:
        free = set(self.free_cells())
        at_cell = {cell: id for id, cell in self.cells.items()}
        ways = []
        for direction in DIRECTIONS:
            near = self.neighbour(self.cells[thing.id], direction)
            far = self.neighbour(near, direction) if near else None
            other = at_cell.get(near) if near else None
            here = other is not None and self.is_here(self.things[other], beat)
            if here and far in free and (other, "splits") not in self.done:
                ways.append((other, near, far))
        if not ways:
            return False
        other, near, far = self.choose(ways)
        start, end = self.span(beat, 0.75, 0.85)
        run = (end - start) / 1.35  # each crosses its cell in this time
        # The other starts when the two touch, a third of the way: at the end one would cover it.
        self.move(self.things[other], far, round(start + 0.35 * run, 3), end)
        self.move(thing, near, start, round(start + run, 3))
        self.log("hits", start, end, thing.id, other)
        return True

    def _blinks(self, thing: Thing, beat: int) -> bool:
        start, end = self.span(beat, 0.35, 0.5)
        last = thing.visible.pop()
        thing.visible += [[last[0], start], [end, last[1]]]
        self.log("blinks", start, end, thing.id)
        return True

    def _scales(self, thing: Thing, beat: int, kind: str, factor: float) -> bool:
        start, end = self.span(beat)
        thing.scale += [[start, 1.0], [end, factor]]
        self.log(kind, start, end, thing.id)
        return True

    def _grows(self, thing: Thing, beat: int) -> bool:
        return thing.size == "small" and self._scales(thing, beat, "grows", 1.65)

    def _shrinks(self, thing: Thing, beat: int) -> bool:
        return thing.size == "big" and self._scales(thing, beat, "shrinks", 0.6)

    def _turns(self, thing: Thing, beat: int) -> bool:
        colours = [c for c in COLOURS if c not in self.used_colours()]
        start, _ = self.span(beat, 0.5, 0.6)
        moment = round(start + 0.25 * self.beat_s, 3)
        colour = self.choose(colours)
        thing.colours.append([moment, colour])
        self.log("turns", moment - 0.1, moment + 0.1, thing.id, value=colour)
        return True

    def _spins(self, thing: Thing, beat: int) -> bool:
        if thing.name not in ROTATABLE:
            return False
        start, end = self.span(beat, 0.7, 0.85)
        angle = thing.angle[-1][1]
        # 30 degrees short of a full turn, so that it can be seen afterwards
        thing.angle += [[start, angle], [end, angle + 330.0]]
        self.log("spins", start, end, thing.id)
        return True

    def _splits(self, thing: Thing, beat: int) -> bool:
        start, end = self.span(beat)
        thing.spread += [[start, 0.0], [end, 0.085]]
        self.log("splits", start, end, thing.id)
        return True

    def _appears(self, thing: Thing, beat: int) -> bool:
        untouched = not any(thing.id in (event.thing, event.other) for event in self.events)
        if beat == 0 or not untouched:
            return False
        start, _ = self.span(beat, 0.5, 0.7)
        thing.visible = [[start, self.duration_s + 1]]
        self.log("appears", round(start - 0.1, 3), round(start + 0.1, 3), thing.id)
        return True

    def _leaves(self, thing: Thing, beat: int) -> bool:
        free = set(self.free_cells())
        cell, ways = self.cells[thing.id], []
        for direction in DIRECTIONS:  # the way out must be clear
            step = self.neighbour(cell, direction)
            while step is not None and step in free:
                step = self.neighbour(step, direction)
            if step is None:
                ways.append(direction)
        if not ways:
            return False
        direction = self.choose(ways)
        start, end = self.span(beat, 0.7, 0.85)
        dx, dy = DIRECTIONS[direction]
        x, y = thing.position[-1][1:]
        edge = RADIUS[thing.size] * thing.scale[-1][1]  # out of the picture when the leaving ends
        out = [
            x + dx * (1 + edge - x if dx > 0 else x + edge),
            y + dy * (1 + edge - y if dy > 0 else y + edge),
        ]
        thing.position += [[start, x, y], [end, round(out[0], 3), round(out[1], 3)]]
        thing.visible[-1][1] = end
        del self.cells[thing.id]
        self.log("leaves", start, end, thing.id, value=direction)
        return True

    # -- signs ---------------------------------------------------------------------------------

    def add_sign(self, beat: int, texts: tuple[str, ...]) -> bool:
        """Show one new sign in this beat, in a row that no shape occupies."""
        shown = {t.name for t in self.things}
        rows = [r for r in range(GRID) if r not in {cell[1] for cell in self.cells.values()}]
        free = [text for text in texts if text not in shown]
        if not rows or not free:
            return False
        start, end = self.span(beat, 0.7, 0.88)
        x = round(float(self.rng.uniform(0.36, 0.64)), 3)
        sign = Thing(
            id=len(self.things),
            kind="sign",
            name=self.choose(free),
            colour=self.choose(tuple(COLOURS)),
            visible=[[start, end]],
            position=[[0.0, x, round((self.choose(rows) + 0.5) / GRID, 3)]],
        )
        sign.colours = [[0.0, sign.colour]]
        self.things.append(sign)
        self.log("sign", start, end, sign.id, value=sign.name)
        return True


def _plan_stage(stage: _Stage) -> None:
    """Two or three shapes that act, one event a beat, one action perhaps repeated to be counted."""
    rng = stage.rng
    num_shapes = 2 if stage.num_beats < 4 else int(rng.integers(2, 4))
    shapes = [stage.add_shape() for _ in range(num_shapes)]
    beats = list(range(1, stage.num_beats - 1)) or [0]
    late = [thing for thing in shapes if rng.random() < 0.3][: len(shapes) - 1]
    for thing in late:  # planned first: nothing may happen to a thing before it appears
        if len(beats) > 1:
            beat = beats.pop(int(rng.integers(0, max(1, len(beats) // 2))))
            stage.act(thing, "appears", beat)
    plan: list[tuple[Thing | None, str]] = []
    if rng.random() < 0.5 and len(beats) >= 2:
        repeated = stage.choose(("blinks", "spins", "blinks"))
        able = [t for t in shapes if repeated != "spins" or t.name in ROTATABLE]
        if able:
            plan += [(stage.choose(able), repeated)] * int(rng.integers(1, min(4, len(beats)) + 1))
    most = min(len(beats), 9)
    num_events = int(rng.integers(max(1, 2 * most // 3), most + 1))
    rarer = ("grows", "shrinks", "turns", "turns", "spins", "blinks")
    kinds = ("moves",) * 5 + ("hits",) * 4 + rarer
    with_signs = rng.random() < 0.3
    while len(plan) < num_events:
        plan.append((None, "sign" if with_signs and rng.random() < 0.4 else stage.choose(kinds)))
    order = [plan[i] for i in rng.permutation(len(plan))][: len(beats)]
    texts = stage.choose((WORDS, DIGITS))
    chosen = sorted(rng.choice(len(beats), size=len(order), replace=False))
    planned = dict(zip(chosen, order, strict=True))
    counted = {(p.id, k) for p, k in plan if p is not None}
    for i, beat in enumerate(beats):  # in the order of time: each act needs the stage as it is then
        present = [t for t in shapes if stage.is_here(t, beat)]
        if i not in planned:
            if i >= len(beats) // 2 and present and rng.random() < 0.5:  # the closing acts
                stage.act(stage.choose(present), stage.choose(("leaves", "leaves", "splits")), beat)
            continue
        thing, kind = planned[i]
        if kind == "sign":
            stage.add_sign(beat, texts)
            continue
        candidates = [thing] if thing else [present[j] for j in rng.permutation(len(present))]
        for actor in candidates:
            if actor not in present or (thing is None and (actor.id, kind) in counted):
                continue
            if stage.act(actor, kind, beat):
                break


def _plan_signs(stage: _Stage) -> None:
    """Words or digits shown one after another, with at most one shape that watches."""
    rng = stage.rng
    if rng.random() < 0.6:
        stage.add_shape()
    beats = list(range(stage.num_beats))
    fewest = 1 if len(beats) < 4 else 2
    num_signs = int(rng.integers(fewest, min(7, len(beats)) + 1))
    texts = stage.choose((WORDS, DIGITS, WORDS + DIGITS))
    for beat in sorted(rng.choice(beats, size=num_signs, replace=False)):
        stage.add_sign(int(beat), texts)


def _plan_tour(stage: _Stage) -> list[list[float]]:
    """Track of a camera that travels past landmarks without crossing its own path."""
    rng = stage.rng
    node, visited = (0, 0), {(0, 0)}
    x = y = 0.0
    camera = [[0.0, 0.0, 0.0]]
    beat, last = int(rng.integers(0, 2)) if stage.num_beats > 2 else 0, ""
    max_legs = int(rng.integers(1, 8))
    names = [(c, n) for c in COLOURS for n in LANDMARKS]
    order = list(rng.permutation(len(names)))
    used: set[str] = set()
    while beat < stage.num_beats and max_legs > 0:
        ways = [
            d for d, (dx, dy) in DIRECTIONS.items()
            if d != last and (node[0] + dx, node[1] + dy) not in visited
        ]  # fmt: skip
        if not ways:
            break
        direction = stage.choose(ways)
        length = min(int(rng.integers(1, 3)), stage.num_beats - beat)
        start = round(stage.phase_s + (beat + 0.04) * stage.beat_s, 3)
        end = round(stage.phase_s + (beat + length - 0.04) * stage.beat_s, 3)
        dx, dy = DIRECTIONS[direction]
        camera += [
            [start, x, y],
            [end, round(x + dx * LEG_LENGTH, 3), round(y + dy * LEG_LENGTH, 3)],
        ]
        stage.log("camera", start, end, value=direction)
        if rng.random() < 0.8:
            colour, name = next(
                (names[i] for i in order if names[i][1] not in used and names[i][0] not in used),
                ("", ""),
            )
            if name:
                used |= {colour, name}
                side = stage.choose((-0.16, 0.16))
                passed = round((start + end) / 2, 3)
                place = (
                    x + 0.5 + dx * LEG_LENGTH / 2 + dy * side,
                    y + 0.5 + dy * LEG_LENGTH / 2 + dx * side,
                )
                thing = Thing(len(stage.things), "landmark", name, colour, size="big")
                thing.visible = [[0.0, stage.duration_s + 1]]
                thing.colours = [[0.0, colour]]
                thing.position = [[0.0, round(place[0], 3), round(place[1], 3)]]
                stage.things.append(thing)
                stage.log("pass", passed - 0.1, passed + 0.1, thing.id)
        node = (node[0] + dx, node[1] + dy)
        visited.add(node)
        x, y = round(x + dx * LEG_LENGTH, 3), round(y + dy * LEG_LENGTH, 3)
        beat, last, max_legs = beat + length, direction, max_legs - 1
        if beat < stage.num_beats - 1 and rng.random() < 0.25:
            beat += 1
    return camera


def _duration(rng: np.random.Generator) -> float:
    """4 to 120 s: four in five under 24 s, one in twenty over 40 s (a world is made in minutes)."""
    draw = rng.random()
    if draw < 0.80:
        return rng.uniform(4, 24)
    return rng.uniform(24, 40) if draw < 0.95 else rng.uniform(40, 120)


SPLITS = {"train": 0, "test": 1}


def make_scene(seed: int, index: int, split: str = "train") -> Scene:
    """The scene with this number: a pure function of its three arguments.

    Args:
        seed: Seed of the world.
        index: Number of the scene in its split.
        split: "train" or "test"; the two never share a scene.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index])
    duration_s = round(_duration(rng), 2)
    beat_s = BEAT_S if duration_s <= 40 else round(duration_s / 20, 3)
    phase_s = 0.0
    if rng.random() >= 0.75:
        phase_s = round(rng.uniform(0, min(beat_s, duration_s - 2 * beat_s + 0.01)), 3)
    stage = _Stage(rng, duration_s, beat_s, phase_s)
    genre = str(rng.choice(["stage", "signs", "tour"], p=[0.5, 0.22, 0.28]))
    camera = [[0.0, 0.0, 0.0]]
    if genre == "stage":
        _plan_stage(stage)
    elif genre == "signs":
        _plan_signs(stage)
    else:
        camera = _plan_tour(stage)
    rates = FRAME_RATES if duration_s <= 40 else FRAME_RATES[:2]
    return Scene(
        index=index,
        seed=seed,
        genre=genre,
        duration_s=duration_s,
        source_fps=float(rng.choice(rates)),
        variable_rate=bool(rng.random() < 0.15),
        beat_s=beat_s,
        phase_s=phase_s,
        ground=str(rng.choice(list(GROUNDS))),
        specks=int(rng.integers(3, 7)) if rng.random() < 0.3 else 0,
        things=stage.things,
        events=sorted(stage.events, key=lambda event: event.start_s),
        camera=camera,
    )
