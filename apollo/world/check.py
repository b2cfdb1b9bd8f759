"""The independent checker: what happens in a scene, and the answers, recomputed from the tracks.

`questions.py` knows its answers because the scene was planned so (`scene.events`). Here no plan is
read: a blink is a gap in visibility, a hit is one thing that starts to move because another
arrives, a landmark is passed when the view's centre comes close to it. Where the two disagree, one
of them is wrong. `check_world` does this for a whole data set on disk. Beside this file:
`scene.py` (the tracks), `questions.py` (what is asked), `make.py` (the files).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from apollo.runtime import read_jsonl
from apollo.world.questions import Question
from apollo.world.scene import Event, Scene, Thing, at, colour_at, is_visible, place_of

PASS_DISTANCE = 0.2
"""A landmark is passed if the view's centre comes this near to it, in picture widths."""

NEXT_TO = 0.3
"""A thing is hit by one that comes this near to where it stands, in picture widths: less than a
cell of the grid (1 / 3), more than the jitter of positions in their cells."""

WINDOW_S = 2
"""Questions of the kind "when" are answered on a grid of this many seconds."""

Query = dict[str, Any]


class NoSingleAnswerError(ValueError):
    """The tracks do not single out one answer to a question."""


# -- What happens, read off the tracks ---------------------------------------------------------


def _changes(track: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """Pairs of successive keys `[t_s, value...]` between which the value changes."""
    return [(a, b) for a, b in pairwise(track) if not np.allclose(a[1:], b[1:])]


def _direction(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"


def _is_outside(x: float, y: float) -> bool:
    return not (0 <= x <= 1 and 0 <= y <= 1)


def _motions(scene: Scene) -> list[Event]:
    """Everything that shapes do by changing their place: "moves", "hits" and "leaves"."""
    parts = [
        (shape.id, before, after)
        for shape in scene.shapes
        for before, after in _changes(shape.position)
        if is_visible(shape, before[0])
    ]
    out, pushed = [], set()
    for thing, (start, *_), (end, *target) in parts:
        for i, (other, (moment, *stood), (until, *_)) in enumerate(parts):
            near = np.hypot(*np.subtract(target, stood)) <= NEXT_TO
            if other != thing and near and start < moment <= end:
                out.append(Event("hits", start, max(end, until), thing, other))
                pushed.add(i)
    hitting = {(event.thing, event.start_s) for event in out}
    for i, (thing, (start, *origin), (end, *target)) in enumerate(parts):
        if i in pushed or (thing, start) in hitting:
            continue
        kind = "leaves" if _is_outside(*target) else "moves"
        way = _direction(*np.subtract(target, origin))
        out.append(Event(kind, start, end, thing, value=way))
    return out


def _transformations(shape: Thing) -> list[Event]:
    """Everything that a shape does in its place."""
    out = []
    for (start, before), (end, after) in _changes(shape.scale):
        out.append(Event("grows" if after > before else "shrinks", start, end, shape.id))
    out += [Event("spins", a[0], b[0], shape.id) for a, b in _changes(shape.angle)]
    out += [Event("splits", a[0], b[0], shape.id) for a, b in _changes(shape.spread)]
    out += [Event("turns", b[0], b[0], shape.id, value=b[1]) for b in shape.colours[1:]]
    out += [Event("blinks", a[1], b[0], shape.id) for a, b in pairwise(shape.visible)]
    return [event for event in out if event.kind == "blinks" or is_visible(shape, event.middle_s)]


def _signs(scene: Scene) -> list[Event]:
    """The signs in the order in which they are shown."""
    out = []
    for sign in (thing for thing in scene.things if thing.kind == "sign"):
        out += [Event("sign", a, b, sign.id, value=sign.name) for a, b in sign.visible]
    return sorted(out, key=lambda event: event.start_s)


def happenings(scene: Scene) -> list[Event]:
    """What shapes do and which signs are shown, in order of time, read off the tracks alone."""
    out = _motions(scene) + _signs(scene)
    for shape in scene.shapes:
        out += _transformations(shape)
        if (start := shape.visible[0][0]) > 0:
            out.append(Event("appears", start, start, shape.id))
    return sorted(out, key=lambda event: event.start_s)


def camera_legs(scene: Scene) -> list[Event]:
    """The camera's moves, in order of time."""
    return [
        Event("camera", a[0], b[0], value=_direction(b[1] - a[1], b[2] - a[2]))
        for a, b in _changes(scene.camera)
    ]


def passes(scene: Scene) -> list[Event]:
    """The landmarks to which the centre of the view comes near during a leg, in order of time."""
    out = []
    for landmark in (thing for thing in scene.things if thing.kind == "landmark"):
        point = np.array(landmark.position[0][1:])
        for (start, *a), (end, *b) in _changes(scene.camera):
            origin, leg = np.add(a, 0.5), np.subtract(b, a)
            share = float(np.clip((point - origin) @ leg / (leg @ leg), 0, 1))
            if np.linalg.norm(origin + share * leg - point) <= PASS_DISTANCE:
                moment = start + share * (end - start)
                out.append(Event("pass", moment, moment, landmark.id, value=landmark.label))
    return sorted(out, key=lambda event: event.start_s)


def _say(scene: Scene, event: Event) -> str:
    """The event in the words of the questions."""
    name = scene.things[event.thing].name
    if event.kind == "sign":
        return f"sign {name} is shown"
    if event.kind == "hits":
        return f"{name} hits {scene.things[event.other].name}"
    if event.kind in ("moves", "turns"):
        return f"{name} {event.kind} {event.value}"
    return f"{name} {event.kind}"


# -- Answers -----------------------------------------------------------------------------------


def _single(values: list, what: str) -> Any:
    """The only member of `values`."""
    if len(values) != 1:
        raise NoSingleAnswerError(f"{what}: {len(values)} candidates in the tracks, not one")
    return values[0]


def _find(scene: Scene, text: str) -> int:
    """Position, in the order of time, of the only event that these words fit."""
    told = [_say(scene, event) for event in happenings(scene)]
    return _single([i for i, words in enumerate(told) if words == text], text)


def _neighbour(values: list[str], position: int) -> str:
    if not 0 <= position < len(values):
        raise NoSingleAnswerError(f"position {position} asked of {len(values)} in the tracks")
    return values[position]


def _of_thing(scene: Scene, query: Query, *kinds: str) -> list[Event]:
    return [e for e in happenings(scene) if e.thing == query["thing"] and e.kind in kinds]


def _window(event: Event) -> str:
    start = int(event.middle_s // WINDOW_S) * WINDOW_S
    ends = (start, start + WINDOW_S)
    return "-".join(f"{t // 60:02d}:{t % 60:02d}" for t in ends)


def _sign_ordinal(scene: Scene, query: Query) -> str:
    return _neighbour([sign.value for sign in _signs(scene)], query["index"])


def _sign_beside(scene: Scene, query: Query) -> str:
    names = [sign.value for sign in _signs(scene)]
    shown = [i for i, name in enumerate(names) if name == query["sign"]]
    return _neighbour(names, _single(shown, query["sign"]) + query["step"])


def _sign_when(scene: Scene, query: Query) -> str:
    shown = [sign for sign in _signs(scene) if sign.value == query["sign"]]
    return _window(_single(shown, query["sign"]))


def _sign_with_event(scene: Scene, query: Query) -> str:
    later = happenings(scene)[_find(scene, query["event"]) + 1 :]
    return _neighbour([event.value for event in later if event.kind == "sign"], 0)


def _camera_ordinal(scene: Scene, query: Query) -> str:
    return _neighbour([leg.value for leg in camera_legs(scene)], query["index"])


def _pass_of(scene: Scene, query: Query) -> Event:
    return _single([e for e in passes(scene) if e.thing == query["thing"]], "pass")


def _camera_after_pass(scene: Scene, query: Query) -> str:
    moment = _pass_of(scene, query).start_s
    return _neighbour([leg.value for leg in camera_legs(scene) if leg.start_s > moment], 0)


def _pass_ordinal(scene: Scene, query: Query) -> str:
    return _neighbour([event.value for event in passes(scene)], query["index"])


def _pass_after(scene: Scene, query: Query) -> str:
    moment = _pass_of(scene, query).start_s
    return _neighbour([event.value for event in passes(scene) if event.start_s > moment], 0)


def _place(scene: Scene, thing: Thing, t: float) -> str:
    return place_of(*(at(thing.position, t) - at(scene.camera, t)))


def _place_start(scene: Scene, query: Query) -> str:
    thing = scene.things[query["thing"]]
    return _place(scene, thing, thing.visible[0][0])


def _place_end(scene: Scene, query: Query) -> str:
    return _place(scene, scene.things[query["thing"]], scene.duration_s)


def _leave_side(scene: Scene, query: Query) -> str:
    x, y = scene.things[query["thing"]].position[-1][1:]
    if not _is_outside(x, y):
        raise NoSingleAnswerError(f"thing {query['thing']} never leaves the picture")
    return _direction(x - 0.5, y - 0.5)


def _move_direction(scene: Scene, query: Query) -> str:
    ways = [event.value for event in _of_thing(scene, query, "moves")]
    return _neighbour(ways, 0 if query["which"] == "first" else len(ways) - 1)


def _relation_end(scene: Scene, query: Query) -> str:
    ids = (query["thing"], query["other"])
    here, there = (at(scene.things[i].position, scene.duration_s) for i in ids)
    words = {"left": "left of", "right": "right of", "up": "above", "down": "below"}
    return words[_direction(*(here - there))]


def _action_of(scene: Scene, query: Query) -> str:
    kinds = {event.kind for event in happenings(scene) if event.thing == query["thing"]}
    return _single(sorted(kinds), "action")


def _actor_of(scene: Scene, query: Query) -> str:
    things = {event.thing for event in happenings(scene) if event.kind == query["kind"]}
    return scene.things[_single(sorted(things), query["kind"])].name


def _colour_after(scene: Scene, query: Query) -> str:
    return colour_at(scene.things[query["thing"]], scene.duration_s)


def _colour_before(scene: Scene, query: Query) -> str:
    return colour_at(scene.things[query["thing"]], 0.0)


def _event_ordinal(scene: Scene, query: Query) -> str:
    told = [_say(scene, event) for event in happenings(scene)]
    return _neighbour(told, 0 if query["which"] == "first" else len(told) - 1)


def _event_beside(scene: Scene, query: Query) -> str:
    told = [_say(scene, event) for event in happenings(scene)]
    return _neighbour(told, _find(scene, query["event"]) + query["step"])


def _event_when(scene: Scene, query: Query) -> str:
    return _window(happenings(scene)[_find(scene, query["event"])])


def _action_count(scene: Scene, query: Query) -> str:
    return str(len(_of_thing(scene, query, query["kind"])))


def _cause(scene: Scene, query: Query) -> str:
    hits = [e for e in happenings(scene) if e.kind == "hits" and e.other == query["thing"]]
    return scene.things[_single(hits, "hit").thing].name


def _stay_duration(scene: Scene, query: Query) -> str:
    visible = scene.things[query["thing"]].visible
    stay = min(visible[-1][1], scene.duration_s) - visible[0][0]
    return str(max(WINDOW_S, round(stay / WINDOW_S) * WINDOW_S))


def _faster(scene: Scene, query: Query) -> str:
    """The thing with the shortest move (a move crosses one cell), or the one with the longest."""
    moves = [event for event in happenings(scene) if event.kind == "moves"]
    pick = min if query["pace"] == "quickly" else max
    return scene.things[pick(moves, key=lambda event: event.end_s - event.start_s).thing].name


def _still_colour(scene: Scene, query: Query) -> str:
    return colour_at(scene.things[query["thing"]], scene.duration_s / 2)


ANSWERS: dict[str, Callable[[Scene, Query], str]] = {
    "sign_ordinal": _sign_ordinal,
    "sign_after": _sign_beside,
    "sign_before": _sign_beside,
    "sign_count": lambda scene, query: str(len(_signs(scene))),
    "sign_when": _sign_when,
    "sign_with_event": _sign_with_event,
    "camera_ordinal": _camera_ordinal,
    "camera_count": lambda scene, query: str(len(camera_legs(scene))),
    "camera_after_pass": _camera_after_pass,
    "pass_ordinal": _pass_ordinal,
    "pass_after": _pass_after,
    "pass_count": lambda scene, query: str(len(passes(scene))),
    "place_start": _place_start,
    "place_end": _place_end,
    "leave_side": _leave_side,
    "move_direction": _move_direction,
    "relation_end": _relation_end,
    "action_of": _action_of,
    "actor_of": _actor_of,
    "colour_after": _colour_after,
    "colour_before": _colour_before,
    "event_ordinal": _event_ordinal,
    "event_after": _event_beside,
    "event_before": _event_beside,
    "event_when": _event_when,
    "action_count": _action_count,
    "cause": _cause,
    "stay_duration": _stay_duration,
    "faster": _faster,
    "ground_colour": lambda scene, query: scene.ground,
    "still_colour": _still_colour,
    "still_texture": lambda scene, query: scene.things[query["thing"]].texture,
    "fact_opposite": lambda scene, query: {
        "left": "right",
        "right": "left",
        "up": "down",
        "down": "up",
    }[query["word"]],
    "fact_digit": lambda scene, query: str(query["digit"] + 1),
}


def recompute(scene: Scene, question: Question) -> str:
    """The answer to a question, from the scene's tracks and the question's `family` and `query`.

    Raises:
        NoSingleAnswerError: the tracks have no answer to this, or several.
        ValueError: a family that the checker does not know.
    """
    if question.family not in ANSWERS:
        raise ValueError(
            f"cannot check questions of the family {question.family!r}: "
            "write its answer into ANSWERS in apollo/world/check.py"
        )
    return ANSWERS[question.family](scene, question.query)


# -- A made world ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_world` found; each mismatch is one readable line."""

    num_scenes: int
    num_questions: int
    mismatches: list[str]


def scene_from_dict(data: dict[str, Any]) -> Scene:
    """The scene that `dataclasses.asdict` made plain; keys that are not of a scene are left out."""
    values = {field.name: data[field.name] for field in dataclasses.fields(Scene)}
    values["things"] = [Thing(**thing) for thing in values["things"]]
    values["events"] = [Event(**event) for event in values["events"]]
    return Scene(**values)


def _complaint(scenes: list[Scene], row: dict[str, Any]) -> str | None:
    """What is wrong with one line of questions.jsonl, None if nothing is."""
    options, position = row["options"], row["answer"]
    if len(set(options)) != 4 or position not in range(4):
        return f"needs four different options and an answer from 0 to 3: {options}, {position}"
    if row["scene"] not in range(len(scenes)):
        return f"asks of scene {row['scene']}, but there are {len(scenes)}"
    answer, wrong = options[position], options[:position] + options[position + 1 :]
    question = Question(row["family"], row["question"], answer, wrong, row["query"])
    try:
        truth = recompute(scenes[row["scene"]], question)
    except ValueError as error:
        return str(error)
    return None if truth == answer else f"{answer!r} is given, the tracks say {truth!r}"


def check_world(world_dir: str | Path) -> Report:
    """Recompute every answer of a made world.

    Args:
        world_dir: Holds scenes.jsonl and questions.jsonl; a question's `scene` counts the lines of
            scenes.jsonl from zero.

    Raises:
        ValueError: a file cannot be read or a key is missing.
    """
    world_dir, mismatches, num_questions = Path(world_dir), [], 0
    try:
        scenes = [scene_from_dict(row) for row in read_jsonl(world_dir / "scenes.jsonl")]
        for row in read_jsonl(world_dir / "questions.jsonl"):
            num_questions += 1
            if complaint := _complaint(scenes, row):
                mismatches.append(f"{row['question_id']} ({row['family']}): {complaint}")
    except KeyError as error:
        raise ValueError(
            f"{world_dir} is not a world of this version: a line lacks {error}; "
            "make it again with `apollo world make`"
        ) from error
    return Report(len(scenes), num_questions, mismatches)
