"""Conversations about scenes: the paper's data types (text, image, multi-image, video) as messages.

Each function takes a scene and a `header` that stands for what is seen: media parts (a video,
pictures) or the same thing in words. The words make the text from which a language model learns to
read and to reason over transcripts before it sees, and they ask exactly what is later asked of the
video. Read next: `make.py`, `apollo/train/llm_part.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apollo.messages import Message, question_prompt
from apollo.world import language
from apollo.world.language import clock
from apollo.world.listing import Exchange, lists
from apollo.world.questions import (
    FAMILIES,
    ORDINALS,
    PLACES,
    Question,
    ask_all,
)
from apollo.world.scene import (
    COLOURS,
    DIGITS,
    GROUNDS,
    OPPOSITE,
    SPLITS,
    TEXTURES,
    WORDS,
    Scene,
    at,
    colour_at,
    make_scene,
    place_of,
)

Header = str | list[dict]
DESCRIBE = "Describe the clip from {}."
CAPTION = "Describe the image."


def turns(header: Header, exchanges: Sequence[tuple[str, str]]) -> list[Message]:
    """A conversation of several turns whose first user message opens with the header."""
    messages: list[Message] = []
    for i, (asked, answer) in enumerate(exchanges):
        content: str | list[dict] = asked
        if i == 0 and isinstance(header, str):
            content = f"{header}\n{asked}" if header else asked
        elif i == 0:
            content = [*header, {"type": "text", "text": asked}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _exchange(
    question: Question, rng: np.random.Generator, open_share: float = 0.25
) -> tuple[str, str]:
    """The question as asked and its answer; a share is asked without options."""
    if rng.random() < open_share:
        return question.question, question.answer
    options = question.options(int(rng.integers(4)))
    return question_prompt(question.question, options), question.answer


def about_video(
    scene: Scene,
    questions: Sequence[Question],
    rng: np.random.Generator,
    header: Header,
    spans: np.ndarray,
    max_turns: int = 6,
    describe_share: float = 0.0,
    requests: Sequence[Exchange] = (),
    request_share: float = 0.0,
    open_share: float = 0.25,
) -> list[Message]:
    """Questions about a video, in random order, some turns asking for more instead.

    Args:
        scene: What the video shows.
        questions: At most `max_turns` of these are asked.
        rng: Decides order, options and turns.
        header: The video as a part, or its transcript.
        spans: (C, 2) the clips that are seen, in seconds.
        max_turns: Most exchanges of the conversation.
        describe_share: Chance that a turn asks to describe one clip.
        requests: Of `listing.py`.
        request_share: Chance that a turn asks for one of them.
        open_share: Chance that a question comes without options.
    """
    told = language.lines(scene, spans) if describe_share else []
    left = list(requests)
    rng.shuffle(left)
    weights = np.array([0.3 if FAMILIES[q.family].needs != "frames" else 1.0 for q in questions])
    order = rng.choice(
        len(questions),
        size=min(max_turns, len(questions)),
        replace=False,
        p=weights / weights.sum(),
    )
    exchanges = []
    for i in order:
        kind = rng.random()
        if kind < describe_share:
            clip = int(rng.integers(len(spans)))
            start, end = spans[clip]
            exchanges.append((DESCRIBE.format(f"{clock(start)}-{clock(end)}"), told[clip]))
        elif kind < describe_share + request_share and left:
            exchanges.append(left.pop())
        else:
            exchanges.append(_exchange(questions[i], rng, open_share))
    return turns(header, exchanges)


def captions_of_video(
    scene: Scene,
    rng: np.random.Generator,
    header: Header,
    spans: np.ndarray,
    requests: Sequence[Exchange],
    max_turns: int = 6,
    max_requests: int = 4,
) -> list[Message]:
    """Describe clips of a video, one a turn, in the order of time; then tell what it shows.

    Clips in which something happens are drawn first: most of a description is how things look.

    Args:
        scene: What the video shows.
        rng: Decides which clips.
        header: The video as a part, or its transcript.
        spans: (C, 2) the clips that are seen, in seconds.
        requests: Of `listing.py`.
        max_turns: Most clips that are described.
        max_requests: Most requests that are made.
    """
    weights = np.array([4.0 if events else 1.0 for events in language.assign(scene, spans)])
    drawn = rng.choice(len(spans), min(max_turns, len(spans)), False, weights / weights.sum())
    chosen = [requests[i] for i in rng.permutation(len(requests))[:max_requests]]
    return turns(header, _descriptions(scene, spans, drawn) + chosen)


def _descriptions(scene: Scene, spans: np.ndarray, clips: np.ndarray) -> list[tuple[str, str]]:
    """Requests to describe these clips, in the order of time, and the answers."""
    told = language.lines(scene, spans)
    times = [f"{clock(start)}-{clock(end)}" for start, end in spans]
    return [(DESCRIBE.format(times[clip]), told[clip]) for clip in np.sort(clips)]


def caption_of_image(scene: Scene, t: float, header: Header) -> list[Message]:
    """Describe the frame at `t` seconds."""
    return turns(header, [(CAPTION, language.caption(scene, t))])


def _image_questions(scene: Scene, t: float, rng: np.random.Generator) -> list[Question]:
    """What the frame at `t` seconds can be asked."""

    def wrong(answer: str, pool: Sequence[str]) -> list[str]:
        others = [v for v in pool if v != answer]
        return [others[i] for i in rng.permutation(len(others))[:3]]

    seen = [thing for thing in scene.things if language.in_view(scene, thing, t)]
    out = [
        Question(
            "image_ground",
            "Which colour is the ground?",
            scene.ground,
            wrong(scene.ground, tuple(GROUNDS)),
        )
    ]
    count = sum(thing.kind == "shape" for thing in seen)
    if scene.genre == "stage":
        out.append(
            Question(
                "image_count",
                "How many shapes are there?",
                str(count),
                wrong(str(count), ("0", "1", "2", "3", "4")),
            )
        )
    for thing in seen:
        x, y = at(thing.position, t) - at(scene.camera, t)
        place, colour = place_of(x, y), colour_at(thing, t)
        if thing.kind == "sign":
            pool = DIGITS if thing.name.isdigit() else WORDS
            out.append(
                Question(
                    "image_sign", "What does the sign say?", thing.name, wrong(thing.name, pool)
                )
            )
            continue
        out.append(
            Question(
                "image_colour",
                f"Which colour is the {thing.name}?",
                colour,
                wrong(colour, tuple(COLOURS)),
            )
        )
        out.append(
            Question("image_place", f"Where is the {thing.name}?", place, wrong(place, PLACES))
        )
        if thing.kind == "shape":
            pool = (*TEXTURES, "chequered")
            out.append(
                Question(
                    "image_texture",
                    f"Which texture has the {thing.name}?",
                    thing.texture,
                    wrong(thing.texture, pool),
                )
            )
    return out


def about_image(
    scene: Scene, t: float, rng: np.random.Generator, header: Header, max_turns: int = 4
) -> list[Message]:
    """Up to `max_turns` questions about the frame at `t` seconds, in random order."""
    questions = _image_questions(scene, t, rng)
    order = rng.permutation(len(questions))[:max_turns]
    return turns(header, [_exchange(questions[i], rng) for i in order])


def about_images(
    shown: Sequence[tuple[Scene, float]], rng: np.random.Generator, header: Header
) -> list[Message]:
    """Which of several pictures shows this? Asked of what one of them alone has.

    Args:
        shown: The scene of each picture and its moment in seconds.
        rng: Decides what is asked, and in which order.
        header: The pictures as parts, or their captions.
    """
    names = [
        {
            f"sign {thing.name}" if thing.kind == "sign" else f"{colour_at(thing, t)} {thing.name}"
            for thing in scene.things
            if language.in_view(scene, thing, t)
        }
        for scene, t in shown
    ]
    grounds = [scene.ground for scene, _ in shown]
    exchanges = []
    for i, mine in enumerate(names):
        only = sorted(mine - set().union(*(other for j, other in enumerate(names) if j != i)))
        if only:
            exchanges.append(
                (f"Which image shows the {only[int(rng.integers(len(only)))]}?", ORDINALS[i])
            )
        if grounds.count(grounds[i]) == 1:
            exchanges.append((f"Which image has {grounds[i]} ground?", ORDINALS[i]))
    with_sign = sum(any(name.startswith("sign ") for name in mine) for mine in names)
    exchanges.append(("How many images show a sign?", str(with_sign)))
    return turns(header, [exchanges[i] for i in rng.permutation(len(exchanges))[:3]])


def fact(rng: np.random.Generator) -> list[Message]:
    """Text-only facts and instructions about the world's words."""
    exchanges = []
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(5))
        word = str(rng.choice(list(OPPOSITE)))
        digit = int(rng.integers(0, 9))
        texts = [str(w) for w in rng.choice(WORDS, size=4, replace=False)]
        if kind == 0:
            others = [d for d in (*OPPOSITE, "centre") if d != OPPOSITE[word]]
            wrong = [others[i] for i in rng.permutation(len(others))[:3]]
            question = Question("", f"What is the opposite of {word}?", OPPOSITE[word], wrong)
            exchanges.append(_exchange(question, rng))
        elif kind == 1:
            others = [d for d in DIGITS if d != str(digit + 1)]
            wrong = [others[i] for i in rng.permutation(len(others))[:3]]
            asked = f"Which digit comes after {digit} when one counts?"
            exchanges.append(_exchange(Question("", asked, str(digit + 1), wrong), rng))
        elif kind == 2:
            exchanges.append((f"Repeat: {' '.join(texts)}.", f"{' '.join(texts)}."))
        elif kind == 3:
            i = int(rng.integers(4))
            exchanges.append((f"Which word is {ORDINALS[i]}: {' '.join(texts)}?", texts[i]))
        else:
            start = int(rng.integers(0, 30)) * 2
            length = int(rng.integers(1, 8)) * 2
            span = f"from {clock(start)} to {clock(start + length)}"
            exchanges.append((f"How many seconds are there {span}?", str(length)))
    return turns("", exchanges)


def telling_time(scene: Scene, rng: np.random.Generator) -> float:
    """A moment of the scene in seconds; if it has signs, half of the draws show one."""
    signs = scene.of_kind("sign")
    if signs and rng.random() < 0.5:
        return signs[int(rng.integers(len(signs)))].middle_s
    return float(rng.uniform(0, scene.duration_s))


# -- text alone --------------------------------------------------------------------------------


BRIEF_SHARE = 0.6
"""Of the transcripts, those that do not repeat themselves: shorter, and sooner understood."""
VIDEO_FAMILIES = tuple(name for name, info in FAMILIES.items() if info.needs == "frames")
PRACTISED = (
    "event_after",
    "event_before",
    "event_when",
    "action_count",
    "camera_after_pass",
    "faster",
    "move_direction",
    "sign_after",
    "sign_before",
    "sign_with_event",
    "stay_duration",
)
"""What language models of all sizes still answer worst when they know the rest."""


def _scene(rng: np.random.Generator, seed: int, split: str, longest_s: float) -> Scene:
    """A scene of the split up to this length.

    Those over 24 s are thinned out, attention being quadratic in their length.
    """
    while True:
        scene = make_scene(seed, int(rng.integers(2**40)), split)
        if scene.duration_s <= longest_s and (scene.duration_s <= 24 or rng.random() < 0.15):
            return scene


def balanced_scene(
    rng: np.random.Generator,
    seed: int,
    split: str,
    longest_s: float,
    families: Sequence[str] = VIDEO_FAMILIES,
) -> Scene:
    """A scene of which a family can be asked that was drawn before: rare ones are learnt, too.

    Short scenes never allow some families; after forty tries any scene will do.
    """
    family = families[int(rng.integers(len(families)))]
    for _ in range(40):
        scene = _scene(rng, seed, split, longest_s)
        if FAMILIES[family].ask(scene, rng) is not None:
            break
    return scene


def text_sample(
    seed: int, index: int, split: str = "train", longest_s: float = 120.0
) -> list[Message]:
    """The text-only conversation with this number: a pure function of its arguments.

    It is about a video, a picture or several, told in words, or about facts.

    Args:
        seed: Seed of the world.
        index: Number of the conversation in its split.
        split: "train" or "test", whose scenes are told.
        longest_s: Longest scene that is told, in seconds.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index, 2])
    kind = rng.random()
    if kind < 0.08:
        return fact(rng)
    draw = _scene if kind < 0.36 else balanced_scene
    scene = draw(rng, seed, split, longest_s)
    if kind < 0.18:
        t = telling_time(scene, rng)
        return about_image(scene, t, rng, language.caption(scene, t))
    if kind < 0.26:
        scenes = [
            scene,
            *(_scene(rng, seed, split, longest_s) for _ in range(int(rng.integers(1, 3)))),
        ]
        shown = [(s, telling_time(s, rng)) for s in scenes]
        return about_images(shown, rng, "\n".join(language.caption(s, t) for s, t in shown))
    spans = language.clip_spans(scene.duration_s)
    if kind < 0.36:
        transcript = language.transcript(scene, spans)
        return turns(transcript, _descriptions(scene, spans, rng.permutation(len(spans))[:4]))
    brief = rng.random() < BRIEF_SHARE
    return about_video(
        scene,
        ask_all(scene, rng),
        rng,
        language.transcript(scene, spans, brief),
        spans,
        max_turns=12,
        describe_share=0.0 if brief else 0.1,
        requests=lists(scene, spans),
        request_share=0.35,
        open_share=0.6,
    )


def practice(seed: int, index: int, longest_s: float = 40.0) -> list[Message]:
    """A transcript of which all is asked that `PRACTISED` can ask, in the numbering of its own.

    Args:
        seed: Seed of the world.
        index: Number of the conversation.
        longest_s: Longest scene that is told, in seconds.
    """
    rng = np.random.default_rng([seed, SPLITS["train"], index, 5])
    scene = balanced_scene(rng, seed, "train", longest_s, PRACTISED)
    spans = language.clip_spans(scene.duration_s)
    asked = {q.question: q for _ in range(6) for q in ask_all(scene, rng) if q.family in PRACTISED}
    if not asked:
        return text_sample(seed, index, longest_s=longest_s)
    return about_video(
        scene,
        list(asked.values()),
        rng,
        language.transcript(scene, spans, brief=rng.random() < BRIEF_SHARE),
        spans,
        max_turns=12,
        describe_share=0.1,
        open_share=0.4,
    )
