"""Question families: each turns a scene into a multiple-choice question of known answer.

`FAMILIES` maps a family's name to its function and class (the five of ApolloBench, paper Section
2.3) and to what it takes to answer it: several frames, one frame, or the text alone. A family's
function takes a scene and a generator and returns None where the scene does not allow the question.

The wrong options come from the same scene where it offers them, so that seeing *what* is there does
not tell *when* or *in which order*. `Question.query` says in data what is asked, for the
independent `check.py`. To add a family, write one function and one entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apollo.world.language import clock, event_text, in_view
from apollo.world.scene import (
    COLOURS,
    COLUMNS,
    DIGITS,
    DIRECTIONS,
    GROUNDS,
    LANDMARKS,
    OPPOSITE,
    ROWS,
    SHAPES,
    TEXTURES,
    WORDS,
    Event,
    Scene,
    Thing,
    at,
    colour_at,
    place_of,
)

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
PLACES = tuple(
    dict.fromkeys(
        place_of((c + 0.5) / 3, (r + 0.5) / 3)
        for r in range(len(ROWS))
        for c in range(len(COLUMNS))
    )
)
ACTIONS = (
    "blinks",
    "grows",
    "shrinks",
    "spins",
    "splits",
    "turns",
    "moves",
    "hits",
    "leaves",
    "appears",
)
STAGE_KINDS = (*ACTIONS, "sign")
ALSO = {"hits": ("moves",), "leaves": ("moves",), "blinks": ("appears", "leaves")}
"""What else may be said of a thing that does this: never offered beside it."""
VERBS = {"blinks": "blink", "spins": "spin"}
GIVEN_AWAY_KEPT = 1 / 8
"""Of the questions whose answer the middle of the video shows, this share is asked. Things that
move seldom go far and few are passed: asked of all, two in three could be told from that frame."""


@dataclass
class Question:
    """A question, its right answer and three wrong ones; `query` is the same question as data."""

    family: str
    question: str
    answer: str
    wrong: list[str]
    query: dict[str, Any] = field(default_factory=dict)

    def kind(self, option: str) -> tuple[str, ...]:
        """What a guess knows of an option: itself; of an event only what is done, not by whom."""
        if self.family not in ("event_ordinal", "event_after", "event_before"):
            return (self.family, option)
        done = "sign" if option.startswith("sign ") else option.split()[1]
        return (self.family, self.query.get("which", ""), done)

    def options(self, position: int) -> list[str]:
        """The four options with the right one at this position."""
        out = list(self.wrong)
        out.insert(position, self.answer)
        return out


Family = Callable[[Scene, np.random.Generator], "Question | None"]


def _choose(rng: np.random.Generator, values: Sequence) -> Any:
    return values[int(rng.integers(len(values)))]


def _wrong(
    rng: np.random.Generator, answer: str, near: Sequence[str], pool: Sequence[str]
) -> list[str]:
    """Three wrong options: from the scene (`near`) first, the rest from `pool`."""
    near = [v for v in dict.fromkeys(near) if v != answer]
    far = [v for v in dict.fromkeys(pool) if v != answer and v not in near]
    picked = [near[i] for i in rng.permutation(len(near))][:3]
    picked += [far[i] for i in rng.permutation(len(far))][: 3 - len(picked)]
    assert len(picked) == 3, f"too few options for {answer!r}"
    return [picked[i] for i in rng.permutation(3)]


def _numbers(
    rng: np.random.Generator, answer: int, step: int = 1, least: int = 1, most: int = 7
) -> list[str]:
    """Three other numbers of the pool least step, ..., most step, widened to hold the answer.

    The pool is the same for every answer: a window around the answer would give it away.
    """
    k = answer // step
    pool = [i * step for i in range(min(least, k), max(most, k + 1) + 1) if i != k]
    return [str(pool[i]) for i in rng.permutation(len(pool))[:3]]


def _given_away(rng: np.random.Generator, is_shown_halfway: bool) -> bool:
    """Whether not to ask what is right there in the middle of the video."""
    return is_shown_halfway and rng.random() >= GIVEN_AWAY_KEPT


def _ordinal(rng: np.random.Generator, items: Sequence[Any]) -> tuple[int, str]:
    """A position in the sequence and its name ("first", "second", ..., "last")."""
    i = int(rng.integers(len(items)))
    return i, "last" if i == len(items) - 1 and rng.random() < 0.5 else ORDINALS[i]


# -- Temporal OCR ------------------------------------------------------------------------------


def _signs(scene: Scene) -> list[str]:
    return [event.value for event in scene.of_kind("sign")]


def _sign_pool(texts: Sequence[str]) -> tuple[str, ...]:
    if all(t.isdigit() for t in texts):
        return DIGITS
    return WORDS + DIGITS if any(t.isdigit() for t in texts) else WORDS


def sign_ordinal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which sign is shown at this place of the sequence?"""
    signs = _signs(scene)
    if not 2 <= len(signs) <= len(ORDINALS):
        return None
    i, name = _ordinal(rng, signs)
    return Question(
        "sign_ordinal",
        f"Which sign is shown {name}?",
        signs[i],
        _wrong(rng, signs[i], signs, _sign_pool(signs)),
        {"index": i},
    )


def _sign_beside(scene: Scene, rng: np.random.Generator, step: int, word: str) -> Question | None:
    signs = _signs(scene)
    if len(signs) < 3:
        return None
    i = int(rng.integers(len(signs) - 1)) + (step < 0)
    answer = signs[i + step]
    near = [s for s in signs if s != signs[i]]
    pool = [s for s in _sign_pool(signs) if s != signs[i]]
    return Question(
        f"sign_{word}",
        f"Which sign is shown right {word} {signs[i]}?",
        answer,
        _wrong(rng, answer, near, pool),
        {"sign": signs[i], "step": step},
    )


def sign_after(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which sign follows this one?"""
    return _sign_beside(scene, rng, 1, "after")


def sign_before(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which sign precedes this one?"""
    return _sign_beside(scene, rng, -1, "before")


def sign_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many signs are shown?"""
    count = len(_signs(scene))
    if not count:
        return None
    return Question("sign_count", "How many signs are shown?", str(count), _numbers(rng, count))


def window(t: float) -> str:
    """Name the two seconds on the even grid that hold `t`."""
    start = int(t // 2) * 2
    return f"{clock(start)}-{clock(start + 2)}"


def _when(rng: np.random.Generator, scene: Scene, event: Event) -> list[str] | None:
    """Three other windows, those of other events first; None if the video is too short for them.

    Of the four no two touch: if only the answer stood apart, that would give it away.
    """
    mine = int(event.middle_s // 2)
    clear = [
        k
        for k in range(int(scene.duration_s // 2))
        if 2 * k >= event.end_s or 2 * k + 2 <= event.start_s
    ]
    far = [k for k in clear if abs(k - mine) > 1]
    busy = {int(e.middle_s // 2) for e in scene.events}
    drawn = [far[i] for i in rng.permutation(len(far))]
    kept = [mine]
    for k in sorted(drawn, key=lambda k: k not in busy):
        if len(kept) < 4 and all(abs(k - other) > 1 for other in kept):
            kept.append(k)
    return [window(2 * kept[1 + i]) for i in rng.permutation(3)] if len(kept) == 4 else None


def sign_when(scene: Scene, rng: np.random.Generator) -> Question | None:
    """In which two seconds is this sign shown?"""
    events = scene.of_kind("sign")
    if not events:
        return None
    event = _choose(rng, events)
    wrong = _when(rng, scene, event)
    if wrong is None:
        return None
    return Question(
        "sign_when",
        f"When is the sign {event.value} shown?",
        window(event.middle_s),
        wrong,
        {"sign": event.value},
    )


def sign_with_event(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which sign is the next after something else happened?"""
    if scene.genre != "stage" or len(_signs(scene)) < 2:
        return None
    cases = []
    for event, following in zip(_unique(scene), _unique(scene)[1:], strict=False):
        if event.kind != "sign" and following.kind == "sign":
            cases.append((event, following))
    if not cases:
        return None
    event, following = _choose(rng, cases)
    signs = _signs(scene)
    return Question(
        "sign_with_event",
        f"Which sign is shown right after the {event_text(scene, event)}?",
        following.value,
        _wrong(rng, following.value, signs, _sign_pool(signs)),
        {"event": event_text(scene, event)},
    )


# -- Egocentric --------------------------------------------------------------------------------


def camera_ordinal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which way does the camera move first, second, ..., last?"""
    legs = scene.of_kind("camera")
    if len(legs) < 2:
        return None
    i, name = _ordinal(rng, legs)
    return Question(
        "camera_ordinal",
        f"Which way does the camera move {name}?",
        legs[i].value,
        _wrong(rng, legs[i].value, [leg.value for leg in legs], tuple(DIRECTIONS)),
        {"index": i},
    )


def camera_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """In how many directions, one after another, does it move?"""
    legs = scene.of_kind("camera")
    if not legs:
        return None
    return Question(
        "camera_count",
        "How many moves does the camera make?",
        str(len(legs)),
        _numbers(rng, len(legs)),
    )


def camera_after_pass(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which way does the camera turn after it passed a landmark?"""
    legs, cases = scene.of_kind("camera"), []
    for event in scene.of_kind("pass"):
        later = [leg for leg in legs if leg.start_s > event.middle_s]
        if later:
            cases.append((event, later[0].value))
    if not cases:
        return None
    event, answer = _choose(rng, cases)
    label = scene.things[event.thing].label
    return Question(
        "camera_after_pass",
        f"Which way does the camera move next after it passes the {label}?",
        answer,
        _wrong(rng, answer, (), tuple(DIRECTIONS)),
        {"thing": event.thing},
    )


def _passed(scene: Scene) -> list[str]:
    return [scene.things[event.thing].label for event in scene.of_kind("pass")]


def _landmark_pool(rng: np.random.Generator) -> list[str]:
    return [f"{_choose(rng, tuple(COLOURS))} {name}" for name in LANDMARKS]


def pass_ordinal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What is passed first, second, ..., last?"""
    passed = _passed(scene)
    if len(passed) < 2:
        return None
    i, name = _ordinal(rng, passed)
    return Question(
        "pass_ordinal",
        f"What does the camera pass {name}?",
        passed[i],
        _wrong(rng, passed[i], passed, _landmark_pool(rng)),
        {"index": i},
    )


def pass_after(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What is passed right after this landmark?"""
    passed = _passed(scene)
    if len(passed) < 2:
        return None
    i = int(rng.integers(len(passed) - 1))
    following = scene.things[scene.of_kind("pass")[i + 1].thing]
    if _given_away(rng, in_view(scene, following, scene.duration_s / 2)):
        return None
    near = [p for p in passed if p != passed[i]]
    pool = [p for p in _landmark_pool(rng) if p != passed[i]]
    return Question(
        "pass_after",
        f"What does the camera pass right after the {passed[i]}?",
        passed[i + 1],
        _wrong(rng, passed[i + 1], near, pool),
        {"thing": scene.of_kind("pass")[i].thing},
    )


def pass_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many landmarks are passed?"""
    count = len(_passed(scene))
    if not count:
        return None
    return Question(
        "pass_count", "How many things does the camera pass?", str(count), _numbers(rng, count)
    )


# -- Spatial -----------------------------------------------------------------------------------


def _touching(scene: Scene, thing: int) -> list[Event]:
    """Events that may change where this thing is."""
    return [e for e in scene.of_kind("moves", "hits", "leaves") if thing in (e.thing, e.other)]


def _places(rng: np.random.Generator, scene: Scene, answer: str, thing: int, t: float) -> list[str]:
    """Wrong places: where the thing was at other times, where the others are now."""
    target = scene.things[thing]
    near = [place_of(*key[1:]) for key in target.position if 0 <= key[1] <= 1 and 0 <= key[2] <= 1]
    near += [place_of(*at(t2.position, t)) for t2 in scene.shapes if t2.id != thing]
    return _wrong(rng, answer, near, PLACES)


def _place_halfway(scene: Scene, thing: Thing) -> str:
    return place_of(*at(thing.position, scene.duration_s / 2))


def place_start(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where is something that later moves, when it is first seen?"""
    moved = [t for t in scene.shapes if _touching(scene, t.id)]
    if not moved:
        return None
    thing = _choose(rng, moved)
    answer = place_of(*thing.position[0][1:])
    if _given_away(rng, answer == _place_halfway(scene, thing)):
        return None
    return Question(
        "place_start",
        f"Where is the {thing.label} at first?",
        answer,
        _places(rng, scene, answer, thing.id, 0),
        {"thing": thing.id},
    )


def place_end(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where does something end up that moved?"""
    gone = {e.thing for e in scene.of_kind("leaves")}
    moved = [t for t in scene.shapes if _touching(scene, t.id) and t.id not in gone]
    if not moved:
        return None
    thing = _choose(rng, moved)
    answer = place_of(*thing.position[-1][1:])
    if _given_away(rng, answer == _place_halfway(scene, thing)):
        return None
    return Question(
        "place_end",
        f"Where is the {thing.label} at the end?",
        answer,
        _places(rng, scene, answer, thing.id, scene.duration_s),
        {"thing": thing.id},
    )


def leave_side(scene: Scene, rng: np.random.Generator) -> Question | None:
    """By which side does it leave the picture?"""
    events = scene.of_kind("leaves")
    if not events:
        return None
    event = _choose(rng, events)
    return Question(
        "leave_side",
        f"Which way does the {scene.things[event.thing].label} leave?",
        event.value,
        _wrong(rng, event.value, (), tuple(DIRECTIONS)),
        {"thing": event.thing},
    )


def move_direction(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which way does it move (first, last)?"""
    pushed = {i for e in scene.of_kind("hits") for i in (e.thing, e.other)}
    gone = {e.thing for e in scene.of_kind("leaves")}
    events = [e for e in scene.of_kind("moves") if e.thing not in pushed | gone]
    if not events:
        return None
    thing = _choose(rng, sorted({e.thing for e in events}))
    mine = [e.value.split()[0] for e in events if e.thing == thing]
    name = "" if len(mine) == 1 else _choose(rng, ("first", "last"))
    answer = mine[-1] if name == "last" else mine[0]
    return Question(
        "move_direction",
        f"Which way does the {scene.things[thing].label} move{' ' + name if name else ''}?",
        answer,
        _wrong(rng, answer, mine, tuple(DIRECTIONS)),
        {"thing": thing, "which": name or "first"},
    )


def sides_at_end(scene: Scene) -> list[tuple[Thing, Thing, str]]:
    """Pairs of shapes one of which has moved, and the side of the second where the first ends up.

    Only where the side is clear.
    """
    gone = {e.thing for e in scene.of_kind("leaves")}
    here = [t for t in scene.shapes if t.id not in gone]
    cases = []
    for a in here:
        for b in here:
            if a.id == b.id or not (_touching(scene, a.id) or _touching(scene, b.id)):
                continue
            side = side_of(a, b, scene.duration_s, margin=0.2)
            if side:
                cases.append((a, b, side))
    return cases


def side_of(a: Thing, b: Thing, t: float, margin: float = 0.0) -> str:
    """The side of the second on which the first is at `t` seconds.

    Empty where it is farther to that side than to the next by no more than the margin.
    """
    dx, dy = at(a.position, t) - at(b.position, t)
    if abs(dx) > abs(dy) + margin:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > abs(dx) + margin:
        return "above" if dy < 0 else "below"
    return ""


def relation_end(scene: Scene, rng: np.random.Generator) -> Question | None:
    """At the end, on which side of another thing is it?"""
    cases = sides_at_end(scene)
    if not cases:
        return None
    changed = [case for case in cases if case[2] != side_of(*case[:2], scene.duration_s / 2)]
    if _given_away(rng, not changed):
        return None
    a, b, answer = _choose(rng, changed or cases)
    return Question(
        "relation_end",
        f"At the end, where is the {a.label}, seen from the {b.label}?",
        answer,
        _wrong(rng, answer, (), ("left of", "right of", "above", "below")),
        {"thing": a.id, "other": b.id},
    )


# -- Perception --------------------------------------------------------------------------------


def _actions(scene: Scene) -> dict[int, list[Event]]:
    out: dict[int, list[Event]] = {thing.id: [] for thing in scene.shapes}
    for event in scene.of_kind(*ACTIONS):
        out[event.thing].append(event)
    return out


def action_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What does the thing do, which does one thing only?"""
    acted = {i: {e.kind for e in events} for i, events in _actions(scene).items()}
    pushed = {e.other for e in scene.of_kind("hits")}
    single = [i for i, kinds in acted.items() if len(kinds) == 1 and i not in pushed]
    if not single:
        return None
    thing = _choose(rng, single)
    answer = next(iter(acted[thing]))
    unfit = ALSO.get(answer, ())
    near = [
        kind
        for i, kinds in acted.items()
        if i != thing
        for kind in sorted(kinds)
        if kind not in unfit
    ]
    return Question(
        "action_of",
        f"What does the {scene.things[thing].name} do?",
        answer,
        _wrong(rng, answer, near, [kind for kind in ACTIONS if kind not in unfit]),
        {"thing": thing},
    )


def actor_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which thing does this?"""
    actors: dict[str, set[int]] = {}
    for event in scene.of_kind(*ACTIONS):
        actors.setdefault(event.kind, set()).add(event.thing)
    actors.pop("hits", None)  # moves two things: it has no one actor
    taken = {"moves": scene.of_kind("hits", "leaves"), "appears": scene.of_kind("blinks")}
    single = sorted(k for k, things in actors.items() if len(things) == 1 and not taken.get(k))
    if not single:
        return None
    kind = _choose(rng, single)
    thing = scene.things[next(iter(actors[kind]))]
    near = [t.name for t in scene.shapes]
    return Question(
        "actor_of",
        f"What {kind}?",
        thing.name,
        _wrong(rng, thing.name, near, SHAPES),
        {"kind": kind},
    )


def _turn_colours(scene: Scene, event: Event) -> tuple[str, str]:
    thing = scene.things[event.thing]
    return thing.colours[0][1], thing.colours[1][1]


def colour_after(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour does it take on?"""
    return _colour_change(scene, rng, "colour_after", "Which colour does the {} turn?", 1)


def colour_before(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour did it have before it changed?"""
    return _colour_change(scene, rng, "colour_before", "Which colour is the {} before it turns?", 0)


def _colour_change(
    scene: Scene, rng: np.random.Generator, family: str, text: str, which: int
) -> Question | None:
    events = scene.of_kind("turns")
    if not events:
        return None
    event = _choose(rng, events)
    colours = _turn_colours(scene, event)
    halfway = colour_at(scene.things[event.thing], scene.duration_s / 2)
    if _given_away(rng, colours[which] == halfway):
        return None
    near = [colours[1 - which]] + [c for t in scene.shapes for _, c in t.colours]
    return Question(
        family,
        text.format(scene.things[event.thing].name),
        colours[which],
        _wrong(rng, colours[which], near, tuple(COLOURS)),
        {"thing": event.thing},
    )


# -- Reasoning ---------------------------------------------------------------------------------


def _stage_events(scene: Scene) -> list[Event]:
    return scene.of_kind(*STAGE_KINDS) if scene.genre == "stage" else []


def _unique(scene: Scene) -> list[Event]:
    """The events whose words name one event only."""
    texts = Counter(event_text(scene, e) for e in _stage_events(scene))
    return [e for e in _stage_events(scene) if texts[event_text(scene, e)] == 1]


def _event_pool(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Things that could have happened here and did not."""
    said = {event_text(scene, e) for e in scene.events}
    names = [thing.name for thing in scene.shapes] or [_choose(rng, SHAPES)]
    pool = [
        f"{name} {kind}"
        for name in names
        for kind in ("blinks", "grows", "shrinks", "spins", "splits", "leaves", "appears")
    ]
    pushed = {
        scene.things[i].name
        for e in scene.of_kind("hits", "leaves")
        for i in (e.thing, e.other)
        if i >= 0
    }
    pool += [f"{name} moves {d}" for name in names if name not in pushed for d in DIRECTIONS]
    pool += [f"{a} hits {b}" for a in names for b in names if a != b]
    pool += [f"{name} turns {_choose(rng, tuple(COLOURS))}" for name in names]
    return [text for text in pool if text not in said]


def event_ordinal(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What happens first, or last?"""
    events = _stage_events(scene)
    if len(events) < 2:
        return None
    name = _choose(rng, ("first", "last"))
    answer = event_text(scene, events[0 if name == "first" else -1])
    # What can hardly be the answer is not offered: it would leave fewer to guess from.
    unfit = (" leaves", " splits") if name == "first" else (" appears",)
    near = [text for e in events if not (text := event_text(scene, e)).endswith(unfit)]
    pool = [text for text in _event_pool(scene, rng) if not text.endswith(unfit)]
    return Question(
        "event_ordinal",
        f"What happens {name}?",
        answer,
        _wrong(rng, answer, near, pool),
        {"which": name},
    )


def _event_beside(scene: Scene, rng: np.random.Generator, step: int, word: str) -> Question | None:
    events = _stage_events(scene)
    unique = {id(e) for e in _unique(scene)}
    cases = [i for i, e in enumerate(events) if id(e) in unique and 0 <= i + step < len(events)]
    if len(events) < 3 or not cases:
        return None
    i = _choose(rng, cases)
    asked, answer = event_text(scene, events[i]), event_text(scene, events[i + step])
    near = [text for text in (event_text(scene, e) for e in events) if text != asked]
    return Question(
        f"event_{word}",
        f"What happens right {word} the {asked}?",
        answer,
        _wrong(rng, answer, near, _event_pool(scene, rng)),
        {"event": asked, "step": step},
    )


def event_after(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What happens right after this?"""
    return _event_beside(scene, rng, 1, "after")


def event_before(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What happens right before this?"""
    return _event_beside(scene, rng, -1, "before")


def event_when(scene: Scene, rng: np.random.Generator) -> Question | None:
    """In which two seconds does this happen?"""
    events = [e for e in _unique(scene) if e.kind != "sign"]
    if not events:
        return None
    event = _choose(rng, events)
    wrong = _when(rng, scene, event)
    if wrong is None:
        return None
    text = event_text(scene, event)
    return Question(
        "event_when",
        f"When does this happen: {text}?",
        window(event.middle_s),
        wrong,
        {"event": text},
    )


def action_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How often does the thing blink, or spin?"""
    counts = Counter((e.thing, e.kind) for e in scene.of_kind(*VERBS))
    if not counts:
        return None
    thing, kind = _choose(rng, sorted(counts))
    count = counts[thing, kind]
    # Once is the most frequent number: it must not be the best guess.
    if count == 1 and rng.random() < 0.6:
        return None
    return Question(
        "action_count",
        f"How many times does the {scene.things[thing].label} {VERBS[kind]}?",
        str(count),
        _numbers(rng, count, most=4),
        {"thing": thing, "kind": kind},
    )


def cause(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What pushed this thing away?"""
    hits = scene.of_kind("hits")
    single = [e for e in hits if sum(o.other == e.other for o in hits) == 1]
    if not single:
        return None
    event = _choose(rng, single)
    answer = scene.things[event.thing].name
    near = [t.name for t in scene.shapes if t.id != event.other]
    pool = [s for s in SHAPES if s != scene.things[event.other].name]
    return Question(
        "cause",
        f"What makes the {scene.things[event.other].label} jump away?",
        answer,
        _wrong(rng, answer, near, pool),
        {"thing": event.other},
    )


def _comes_and_goes(scene: Scene) -> tuple[dict[int, float], dict[int, float]]:
    """Shape -> seconds at which it appears, and at which it has left."""
    comes = {e.thing: e.middle_s for e in scene.of_kind("appears")}
    return comes, {e.thing: e.end_s for e in scene.of_kind("leaves")}


def stay_s(scene: Scene, thing: int) -> int | None:
    """Even number of seconds that a shape is in view which appears late or leaves early.

    None for others, and where it is as near to one even number as to the next.
    """
    comes, goes = _comes_and_goes(scene)
    if thing not in comes and thing not in goes:
        return None
    if any(event.thing == thing for event in scene.of_kind("blinks")):
        return None
    stay = goes.get(thing, scene.duration_s) - comes.get(thing, 0.0)
    if stay > 21 or abs(stay / 2 % 1 - 0.5) < 0.15:
        return None
    return max(2, round(stay / 2) * 2)


def stay_duration(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many seconds is something in view that appears late or leaves early?"""
    gaps = {e.thing for e in scene.of_kind("blinks")}
    things = sorted(set().union(*_comes_and_goes(scene)) - gaps)
    if not things:
        return None
    thing = _choose(rng, things)
    answer = stay_s(scene, thing)
    if answer is None:
        return None
    return Question(
        "stay_duration",
        f"How many seconds is the {scene.things[thing].label} in view?",
        str(answer),
        _numbers(rng, answer, step=2, least=3, most=10),
        {"thing": thing},
    )


def faster(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which of the things that move does so quickly?"""
    paces: dict[int, set[str]] = {}
    if scene.of_kind("hits", "leaves"):  # they move things too, at speeds between the two
        return None
    for event in scene.of_kind("moves"):
        paces.setdefault(event.thing, set()).add(event.value.split()[1])
    if len(paces) < 2:
        return None
    word = _choose(rng, ("quickly", "slowly"))
    fits = [thing for thing, pace in paces.items() if pace == {word}]
    if len(fits) != 1 or any(word in pace for thing, pace in paces.items() if thing != fits[0]):
        return None
    answer = scene.things[fits[0]].name
    near = [t.name for t in scene.shapes]
    return Question(
        "faster", f"What moves {word}?", answer, _wrong(rng, answer, near, SHAPES), {"pace": word}
    )


# -- Planted: one frame, or no frame at all, is enough -----------------------------------------


def ground_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour is the ground?"""
    return Question(
        "ground_colour",
        "Which colour is the ground?",
        scene.ground,
        _wrong(rng, scene.ground, (), tuple(GROUNDS)),
    )


def _always(scene: Scene) -> list:
    """Shapes that are in view from start to end with one look."""
    changed = {e.thing for e in scene.of_kind("appears", "leaves", "turns", "blinks", "splits")}
    return [t for t in scene.shapes if t.id not in changed]


def still_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour is a shape that is always there?"""
    things = _always(scene)
    if not things:
        return None
    thing = _choose(rng, things)
    near = [t.colour for t in scene.shapes]
    return Question(
        "still_colour",
        f"Which colour is the {thing.name}?",
        thing.colour,
        _wrong(rng, thing.colour, near, tuple(COLOURS)),
        {"thing": thing.id},
    )


def still_texture(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which texture has a shape that is always there?"""
    things = _always(scene)
    if not things:
        return None
    thing = _choose(rng, things)
    wrong = [t for t in (*TEXTURES, "chequered") if t != thing.texture]
    return Question(
        "still_texture",
        f"Which texture has the {thing.label}?",
        thing.texture,
        [wrong[i] for i in rng.permutation(3)],
        {"thing": thing.id},
    )


def fact_opposite(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A fact about words: needs no video."""
    word = _choose(rng, tuple(OPPOSITE))
    return Question(
        "fact_opposite",
        f"What is the opposite of {word}?",
        OPPOSITE[word],
        _wrong(rng, OPPOSITE[word], (), (*DIRECTIONS, "centre")),
        {"word": word},
    )


def fact_digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A fact about digits: needs no video."""
    digit = int(rng.integers(0, 9))
    return Question(
        "fact_digit",
        f"Which digit comes after {digit} when one counts?",
        str(digit + 1),
        _wrong(rng, str(digit + 1), (), DIGITS),
        {"digit": digit},
    )


@dataclass(frozen=True)
class FamilyInfo:
    """A family's function, its class and what its questions need: "frames", "frame" or "text"."""

    ask: Family
    question_class: str
    needs: str = "frames"


FAMILIES: dict[str, FamilyInfo] = {
    "sign_ordinal": FamilyInfo(sign_ordinal, "temporal_ocr"),
    "sign_after": FamilyInfo(sign_after, "temporal_ocr"),
    "sign_before": FamilyInfo(sign_before, "temporal_ocr"),
    "sign_count": FamilyInfo(sign_count, "temporal_ocr"),
    "sign_when": FamilyInfo(sign_when, "temporal_ocr"),
    "sign_with_event": FamilyInfo(sign_with_event, "temporal_ocr"),
    "camera_ordinal": FamilyInfo(camera_ordinal, "egocentric"),
    "camera_count": FamilyInfo(camera_count, "egocentric"),
    "camera_after_pass": FamilyInfo(camera_after_pass, "egocentric"),
    "pass_ordinal": FamilyInfo(pass_ordinal, "egocentric"),
    "pass_after": FamilyInfo(pass_after, "egocentric"),
    "pass_count": FamilyInfo(pass_count, "egocentric"),
    "place_start": FamilyInfo(place_start, "spatial"),
    "place_end": FamilyInfo(place_end, "spatial"),
    "leave_side": FamilyInfo(leave_side, "spatial"),
    "move_direction": FamilyInfo(move_direction, "spatial"),
    "relation_end": FamilyInfo(relation_end, "spatial"),
    "action_of": FamilyInfo(action_of, "perception"),
    "actor_of": FamilyInfo(actor_of, "perception"),
    "colour_after": FamilyInfo(colour_after, "perception"),
    "colour_before": FamilyInfo(colour_before, "perception"),
    "event_ordinal": FamilyInfo(event_ordinal, "reasoning"),
    "event_after": FamilyInfo(event_after, "reasoning"),
    "event_before": FamilyInfo(event_before, "reasoning"),
    "event_when": FamilyInfo(event_when, "reasoning"),
    "action_count": FamilyInfo(action_count, "reasoning"),
    "cause": FamilyInfo(cause, "reasoning"),
    "stay_duration": FamilyInfo(stay_duration, "reasoning"),
    "faster": FamilyInfo(faster, "reasoning"),
    "ground_colour": FamilyInfo(ground_colour, "perception", "frame"),
    "still_colour": FamilyInfo(still_colour, "perception", "frame"),
    "still_texture": FamilyInfo(still_texture, "perception", "frame"),
    "fact_opposite": FamilyInfo(fact_opposite, "reasoning", "text"),
    "fact_digit": FamilyInfo(fact_digit, "reasoning", "text"),
}


def ask_all(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every family that the scene allows, in the order of `FAMILIES`."""
    asked = (info.ask(scene, rng) for info in FAMILIES.values())
    return [question for question in asked if question is not None]
