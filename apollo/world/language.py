"""Words for scenes: the line of a clip, the transcript of a video, the caption of a frame.

A line is a handful of short sentences, one fact each ("red circle top left. circle moves right
slowly."), so that an encoder can be taught fact by fact and a language model can read a whole video
as timed lines before it ever sees one. An event is told once, in the clip that shows most of it.
Next: `questions.py`.
"""

from __future__ import annotations

import numpy as np

from apollo.video.sampling import ClipSampling, sample
from apollo.world.scene import Event, Scene, Thing, at, colour_at, is_visible, place_of, size_at

SAMPLING = ClipSampling(max_clips=24)
"""The clips that transcripts and captions speak of: 4 frames over 2 s, spaced out in videos over
48 s."""

FACT_WORDS = frozenset(
    "ground sign camera passes moves turns hits blinks grows shrinks spins splits appears "
    "leaves".split()
)
"""Words that tell what kind of fact a phrase is; one without any says how something looks."""


def clip_spans(duration_s: float) -> np.ndarray:
    """(C, 2) start and end of the clips of a video in seconds."""
    return sample(duration_s, SAMPLING)[1]


def clock(t: float) -> str:
    """Seconds as MM:SS, to the nearest second: the notation of the paper's prompt."""
    whole = int(t + 0.5)
    return f"{whole // 60:02d}:{whole % 60:02d}"


def event_text(scene: Scene, event: Event) -> str:
    """What happens, in the present tense; a shape goes by its name alone, unique in its scene."""
    name = scene.things[event.thing].name if event.thing >= 0 else ""
    if event.kind == "sign":
        return f"sign {name} is shown"
    if event.kind == "camera":
        return f"camera moves {event.value}"
    if event.kind == "pass":
        return f"passes {scene.things[event.thing].label}"
    if event.kind == "hits":
        return f"{name} hits {scene.things[event.other].name}"
    if event.kind == "moves":
        return f"{name} moves {event.value.split()[0]}"
    if event.kind == "turns":
        return f"{name} turns {event.value}"
    return f"{name} {event.kind}"


def _told(scene: Scene, event: Event) -> str:
    """The event as a sentence of a line, with the details that a question may ask for."""
    if event.kind == "sign":
        thing = scene.things[event.thing]
        return f"sign {thing.name} in {thing.colour}"
    if event.kind == "moves":
        return f"{scene.things[event.thing].name} moves {event.value}"
    if event.kind == "leaves":
        return f"{scene.things[event.thing].name} leaves {event.value}"
    return event_text(scene, event)


def describe(scene: Scene, thing: Thing, t: float, place: bool = True) -> str:
    """Size, colour, texture, shape and (if `place`) place of a thing at `t` seconds."""
    words = [size_at(thing, t), colour_at(thing, t)]
    if thing.texture != "plain":
        words.append(thing.texture)
    words.append(thing.name)
    if place:
        words.append(place_of(*(at(thing.position, t) - at(scene.camera, t))))
    return " ".join(words)


def in_view(scene: Scene, thing: Thing, t: float) -> bool:
    """Whether at `t` seconds the thing is switched on and its centre lies in the picture."""
    x, y = at(thing.position, t) - at(scene.camera, t)
    return is_visible(thing, t) and 0 <= x <= 1 and 0 <= y <= 1


def _states(scene: Scene, start: float, end: float) -> dict[int, str]:
    """Each shape seen in the clip, as it is in the last of its four frames that shows it."""
    times = [start + (end - start) * k / 4 for k in (3, 2, 1, 0)]
    states = {}
    for thing in scene.shapes:
        seen = next((t for t in times if in_view(scene, thing, t)), None)
        if seen is not None:
            states[thing.id] = describe(scene, thing, seen)
    return states


def assign(scene: Scene, spans: np.ndarray) -> list[list[Event]]:
    """Give each event to the clip that overlaps it most.

    A camera leg goes to every clip more than a third of which it fills.

    Args:
        scene: The scene.
        spans: (C, 2) start and end of each clip in seconds.

    Returns:
        For each clip its events in order of time. An event that no clip sees is in none.
    """
    told: list[list[Event]] = [[] for _ in spans]
    for event in scene.events:
        overlap = np.minimum(spans[:, 1], event.end_s) - np.maximum(spans[:, 0], event.start_s)
        if event.kind == "camera":
            for clip in np.flatnonzero(overlap > (spans[:, 1] - spans[:, 0]) / 3):
                told[clip].append(event)
        elif len(spans) and overlap.max() > 0:
            told[int(overlap.argmax())].append(event)
    return told


def lines(scene: Scene, spans: np.ndarray, brief: bool = False) -> list[str]:
    """One line for each clip: its shapes, then what happens; "nothing." if there is neither.

    Args:
        scene: The scene.
        spans: (C, 2) start and end of each clip in seconds.
        brief: Tell of a shape only where it is new or other than told before.
    """
    out: list[str] = []
    known: dict[int, str] = {}
    for (start, end), events in zip(spans, assign(scene, spans), strict=True):
        states = _states(scene, start, end)
        facts = [state for thing, state in states.items() if known.get(thing) != state]
        if brief:
            known.update(states)
        facts += [_told(scene, event) for event in events]
        out.append(". ".join(facts or ["nothing"]) + ".")
    return out


def transcript(scene: Scene, spans: np.ndarray, brief: bool = False) -> str:
    """The video in words, in the form in which the model will see its clips.

    Args:
        scene: The scene.
        spans: (C, 2) start and end of each clip in seconds.
        brief: See `lines`.
    """
    told = zip(spans, lines(scene, spans, brief), strict=True)
    clips = [f"clip from {clock(s)}-{clock(e)}: {line}" for (s, e), line in told]
    return "\n".join([f"{scene.ground} ground.", *clips])


def caption(scene: Scene, t: float) -> str:
    """What the frame at `t` seconds shows."""
    facts = [f"{scene.ground} ground"]
    for thing in scene.things:
        if not in_view(scene, thing, t):
            continue
        if thing.kind == "sign":
            facts.append(f"sign {thing.name} in {colour_at(thing, t)}")
        elif thing.kind == "landmark":
            x, y = at(thing.position, t) - at(scene.camera, t)
            facts.append(f"{thing.label} {place_of(x, y)}")
        else:
            facts.append(describe(scene, thing, t))
    return ". ".join(facts) + "."


def frame_facts(scene: Scene, t: float) -> list[str]:
    """Phrases, one fact each, true of the frame at `t` seconds: what an image encoder is taught."""
    facts = [f"{scene.ground} ground"]
    for thing in scene.things:
        if in_view(scene, thing, t):
            facts += _looks(scene, thing, t)
    return facts


def _looks(scene: Scene, thing: Thing, t: float) -> list[str]:
    colour = colour_at(thing, t)
    if thing.kind == "sign":
        return [f"sign {thing.name}", f"{colour} sign"]
    place = place_of(*(at(thing.position, t) - at(scene.camera, t)))
    looks = [f"{colour} {thing.name}", f"{thing.name} {place}", f"{place} {colour}"]
    if thing.kind == "shape":
        looks += [f"{size_at(thing, t)} {thing.name}", f"{thing.texture} {thing.name}"]
    return looks


def clip_facts(scene: Scene, spans: np.ndarray, clip: int) -> list[str]:
    """Phrases true of one clip of a video: looks at its last frames, and above all what happens.

    Args:
        scene: The scene.
        spans: (C, 2) start and end of all clips in seconds: an event is a fact of one of them.
        clip: Which of the clips.
    """
    start, end = spans[clip]
    times = [max(t, start) for t in (end - 0.5, end - 1.0, start)]
    facts = []
    for thing in scene.shapes:
        seen = next((t for t in times if in_view(scene, thing, t)), None)
        if seen is not None:
            facts += _looks(scene, thing, seen)[:2]
    camera_moves = False
    for event in assign(scene, spans)[clip]:
        facts.append(event_text(scene, event))
        camera_moves |= event.kind == "camera"
        if event.kind in ("moves", "leaves"):
            facts.append(_told(scene, event))
        if event.kind not in ("camera", "pass", "sign"):
            facts.append(event.kind)
    if scene.genre == "tour" and not camera_moves:
        facts.append("camera rests")
    return facts


def kind_of_fact(phrase: str) -> str:
    """Say what kind of fact a phrase names: one of `FACT_WORDS`, or "looks"."""
    verbs = (word for word in phrase.split() if word in FACT_WORDS)
    return next(verbs, "looks")
