"""The micro world: same seed same bytes, answers that the tracks confirm, pixels that show them."""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from apollo.runtime import append_jsonl
from apollo.world import corpus, drills, listing
from apollo.world.check import (
    ANSWERS,
    check_world,
    happenings,
    passes,
    recompute,
    scene_from_dict,
)
from apollo.world.language import caption, clip_spans, in_view, lines, transcript
from apollo.world.make import _Chooser, make_world
from apollo.world.questions import ACTIONS, FAMILIES, ORDINALS, Question, ask_all, side_of
from apollo.world.render import SIZE, frame, frame_times, write_video
from apollo.world.scene import (
    COLOURS,
    DIRECTIONS,
    GROUNDS,
    SPLITS,
    Event,
    Scene,
    Thing,
    at,
    colour_at,
    is_visible,
    make_scene,
    place_of,
)

NUM_SCENES = 1500  # of each split
NUMBERS = ("sign_count", "camera_count", "pass_count", "action_count", "stay_duration")
WHEN = ("sign_when", "event_when")


@dataclasses.dataclass
class Asked:
    """A scene, one question of every family that it allows, and what the checker saw happen."""

    scene: Scene
    questions: list[Question]
    happened: list[Event]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    scenes = [make_scene(5, index, split) for split in SPLITS for index in range(NUM_SCENES)]
    return [
        Asked(scene, ask_all(scene, np.random.default_rng(i)), happenings(scene))
        for i, scene in enumerate(scenes)
    ]


@pytest.fixture(scope="module")
def by_family(asked) -> dict[str, list[tuple[Asked, Question]]]:
    out = defaultdict(list)
    for one in asked:
        for question in one.questions:
            out[question.family].append((one, question))
    return out


def plain(scene: Scene) -> str:
    return json.dumps(dataclasses.asdict(scene))


# -- Scenes ------------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path):
    short = next(i for i in range(200) if make_scene(1, i).duration_s < 5)
    for name in ("a.mp4", "b.mp4"):
        write_video(make_scene(1, short), tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert plain(make_scene(1, short)) == plain(make_scene(1, short))
    assert plain(make_scene(1, short)) != plain(make_scene(2, short))


def test_no_scene_is_in_both_splits(asked):
    dumps = [plain(dataclasses.replace(one.scene, index=0)) for one in asked]
    assert len(set(dumps)) == len(dumps) == 2 * NUM_SCENES


def test_scene_survives_json(asked):
    for one in asked[:100]:
        assert scene_from_dict(json.loads(plain(one.scene)) | {"video": "a.mp4"}) == one.scene


def test_shapes_can_be_told_apart(asked):
    """No two shapes of a scene share a name, or a colour at any time: a question may use either."""
    for one in asked:
        names = [shape.name for shape in one.scene.shapes]
        colours = [colour for shape in one.scene.shapes for _, colour in shape.colours]
        assert len(set(names)) == len(names) and len(set(colours)) == len(colours)


@pytest.mark.parametrize("track", ["position", "scale", "angle", "spread", "colours", "visible"])
def test_keys_of_every_track_are_in_order(asked, track):
    for one in asked:
        for thing in one.scene.things:
            times = [key[0] for key in getattr(thing, track)]
            assert all(a < b for a, b in pairwise(times)), (one.scene.index, thing.name)


def test_spans_of_visibility_are_not_empty(asked):
    for one in asked:
        spans = [span for thing in one.scene.things for span in thing.visible]
        assert all(start < end for start, end in spans), one.scene.index


def test_planned_events_are_in_the_tracks(asked):
    """Everything that was planned shows, and nothing else does."""
    for one in asked:
        planned = Counter((e.kind, e.thing) for e in one.scene.of_kind(*ACTIONS, "sign", "pass"))
        seen = Counter((e.kind, e.thing) for e in one.happened + passes(one.scene))
        assert planned == seen, one.scene.index


# -- Questions ---------------------------------------------------------------------------------


def test_every_family_occurs_and_is_checked(by_family):
    assert set(ANSWERS) == set(FAMILIES) == set(by_family)
    assert len(FAMILIES) >= 20
    rare = {family: len(found) for family, found in by_family.items() if len(found) < 20}
    assert not rare


def test_four_different_options(by_family):
    for family, found in by_family.items():
        for one, question in found:
            options = question.options(one.scene.index % 4)
            assert len(options) == len(set(options)) == 4, (family, options)
            assert options[one.scene.index % 4] == question.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_checker_agrees(by_family, family):
    for one, question in by_family[family]:
        query = json.loads(json.dumps(question.query))  # as a file keeps it
        truth = recompute(one.scene, dataclasses.replace(question, answer="", query=query))
        assert truth == question.answer, (one.scene.index, question.question)


@pytest.mark.parametrize("family", ["camera_ordinal", "camera_after_pass", "leave_side",
                                    "move_direction", "relation_end"])  # fmt: skip
def test_directions_are_balanced(by_family, family):
    answers = Counter(question.answer for _, question in by_family[family])
    shares = [count / answers.total() for count in answers.values()]
    assert len(shares) == len(DIRECTIONS)
    slack = 4 * np.sqrt(0.25 * 0.75 / answers.total())  # four standard deviations
    assert all(abs(share - 0.25) < slack for share in shares), answers


def ways_of(scene: Scene) -> dict[str, set[str]]:
    """For every shape the ways in which its place changes, for whatever reason."""
    out: dict[str, set[str]] = {shape.name: set() for shape in scene.shapes}
    for shape in scene.shapes:
        for (_, *a), (_, *b) in pairwise(shape.position):
            along = {way: np.dot(np.subtract(b, a), unit) for way, unit in DIRECTIONS.items()}
            out[shape.name] |= {way for way, length in along.items() if length > 0.1}
    return out


def window_bounds(window: str) -> tuple[int, int]:
    numbers = [int(n) for n in re.findall(r"\d+", window)]
    return 60 * numbers[0] + numbers[1], 60 * numbers[2] + numbers[3]


def is_also_right(one: Asked, question: Question, option: str) -> bool:
    """Whether a wrong option is true of the tracks as well, in the families where that can be."""
    scene, query, family = one.scene, question.query, question.family
    ways = ways_of(scene)
    if family == "action_of":
        return option == "moves" and bool(ways[scene.things[query["thing"]].name])
    if family == "actor_of":
        if query["kind"] == "moves":
            return bool(ways.get(option))
        again = {shape.name for shape in scene.shapes if len(shape.visible) > 1}
        return query["kind"] == "appears" and option in again
    if family in ("event_after", "event_before", "event_ordinal"):
        name, verb, *way = option.split()
        said = Counter(e.kind for e in one.happened if scene.things[e.thing].name == name)
        return verb == "moves" and not said["moves"] and way[0] in ways.get(name, ())
    if family == "sign_when":
        event = next(e for e in one.happened if e.value == query["sign"])
        start, end = window_bounds(option)
        return start < event.end_s and event.start_s < end
    return False


def test_no_wrong_option_is_also_right(by_family):
    families = ("action_of", "actor_of", "event_after", "event_before", "event_ordinal")
    for family in (*families, "sign_when"):
        for one, question in by_family[family]:
            also = [option for option in question.wrong if is_also_right(one, question, option)]
            assert not also, (family, one.scene.index, question)


def test_durations_are_far_from_the_next_option(by_family):
    """To the eye a stay lasts as long as the thing is on and in the picture."""
    for one, question in by_family["stay_duration"]:
        thing = one.scene.things[question.query["thing"]]
        seen = sum(min(end, one.scene.duration_s) - start for start, end in thing.visible)
        distance = {abs(int(option) - seen): option for option in question.options(0)}
        assert distance[min(distance)] == question.answer, (one.scene.index, seen, question)
        assert sorted(distance)[1] - min(distance) > 0.4, (one.scene.index, seen, question)


@pytest.fixture(scope="module")
def chosen(asked) -> list[dict]:
    """The rows that `apollo world make` would keep of these questions."""
    chooser = _Chooser(np.random.default_rng(0))
    scene = {"split": "test", "video": "a.mp4", "duration_s": 9.0}
    rows = (chooser.choose(i, scene, one.questions) for i, one in enumerate(asked))
    return [row for some in rows for row in some]


def test_chosen_options_stand_at_every_place(chosen):
    for family in FAMILIES:
        places = Counter(row["answer"] for row in chosen if row["family"] == family)
        assert len(places) == 4 and max(places.values()) - min(places.values()) <= 1, family


@pytest.mark.parametrize("family", NUMBERS)
def test_neither_a_number_nor_its_rank_gives_the_answer_away(chosen, family):
    ranks: Counter = Counter()
    answers: Counter = Counter()
    for row in (row for row in chosen if row["family"] == family):
        numbers = [int(option) for option in row["options"]]
        answers[numbers[row["answer"]]] += 1
        ranks[sorted(numbers).index(numbers[row["answer"]])] += 1
    assert answers.total() > 50
    assert answers.most_common(1)[0][1] / answers.total() < 0.40, answers
    assert ranks.most_common(1)[0][1] / ranks.total() < 0.45, ranks


def test_what_is_often_right_is_as_often_offered(chosen):
    """Who learns from half of the questions how often what is right guesses few of the rest."""
    rows = [row for row in chosen if row["family"] not in ("sign_with_event", "faster")]  # rare
    offered: Counter = Counter()
    right: Counter = Counter()
    hits: Counter = Counter()
    asked: Counter = Counter()
    for number, row in enumerate(rows):
        family = row["family"]
        kinds = [Question(family, "", "", [], row["query"]).kind(o) for o in row["options"]]
        if number % 2:
            best = max(kinds, key=lambda kind: (right[kind] + 1) / (offered[kind] + 4))
            asked[family] += 1
            hits[family] += kinds.index(best) == row["answer"]
        offered.update(kinds)
        right[kinds[row["answer"]]] += 1
    for family, count in asked.items():
        slack = 3 * np.sqrt(0.3 * 0.7 / count)
        assert hits[family] / count < 0.33 + slack, (family, hits[family], count)
    assert hits.total() / asked.total() < 0.27


@pytest.mark.parametrize("family", WHEN)
def test_the_gaps_between_windows_do_not_give_the_answer_away(by_family, family):
    """Guessing among the windows that touch no other must be no better than any guess."""
    expected_hits = 0.0
    for _, question in by_family[family]:
        starts = [window_bounds(option)[0] for option in question.options(0)]
        alone = [a for a in starts if not any(abs(a - b) == 2 for b in starts)] or starts
        expected_hits += (starts[0] in alone) / len(alone)
    share = expected_hits / len(by_family[family])
    assert share < 0.25 + 4 * np.sqrt(0.25 * 0.75 / len(by_family[family])), share


def seen_halfway(scene: Scene, query: dict) -> set[str]:
    """What the middle of the video tells of the thing that is asked about."""
    t, thing = scene.duration_s / 2, scene.things[query["thing"]]
    seen = {colour_at(thing, t), place_of(*at(thing.position, t))}
    seen |= {other.label for other in scene.things if in_view(scene, other, t)}
    return seen | ({side_of(thing, scene.things[query["other"]], t)} if "other" in query else set())


@pytest.mark.parametrize(
    "family",
    ["pass_after", "place_start", "place_end", "relation_end", "colour_before", "colour_after"],
)
def test_the_middle_of_the_video_does_not_give_the_answer_away(by_family, family):
    shown = [q.answer in seen_halfway(one.scene, q.query) for one, q in by_family[family]]
    assert len(shown) > 30
    assert np.mean(shown) < 0.3 + 3 * np.sqrt(0.3 * 0.7 / len(shown))


def test_practice_asks_of_a_transcript_what_is_hard_and_nothing_else():
    easy = re.compile(
        "How many (signs|moves)|Which colour|Where is|What does the|Which sign is shown (?!right)"
    )
    turns = []
    for index in range(60):
        conversation = corpus.practice(0, index)
        assert conversation == corpus.practice(0, index)
        asked = [message["content"] for message in conversation if message["role"] == "user"]
        if "clip from" in asked[0]:
            asked[0] = asked[0].splitlines()[-1]
            assert not [text for text in asked if easy.match(text)]
            turns.append(len(asked))
    assert len(turns) > 40 and np.mean(turns) > 5


# -- Planted shortcuts -------------------------------------------------------------------------


def test_text_questions_need_no_scene(asked):
    families = [name for name, info in FAMILIES.items() if info.needs == "text"]
    assert families
    for family in families:
        for one, other in pairwise(asked[:50]):
            first, second = (
                FAMILIES[family].ask(scene, np.random.default_rng(one.scene.index))
                for scene in (one.scene, other.scene)
            )
            assert first is not None and first == second
            assert recompute(other.scene, first) == first.answer


def painted(picture: np.ndarray, scene: Scene, thing: Thing, t: float) -> int:
    """How many pixels within a tenth of the picture around the thing have exactly its colour."""
    x, y = ((at(thing.position, t) - at(scene.camera, t)) * SIZE).astype(int)
    reach = SIZE // 10
    window = picture[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach].astype(int)
    return int((np.abs(window - COLOURS[colour_at(thing, t)]).max(axis=-1) <= 2).sum())


def test_frame_questions_show_at_the_centre_frame(by_family):
    """The thing that is asked of is in the one frame that a single-frame answerer gets."""
    families = [name for name, info in FAMILIES.items() if info.needs == "frame"]
    assert families
    for family in families:
        for one, question in by_family[family][:150]:
            times = frame_times(one.scene)
            t = float(times[np.abs(times - one.scene.duration_s / 2).argmin()])
            picture = frame(one.scene, t)
            if "thing" in question.query:
                thing = one.scene.things[question.query["thing"]]
                assert painted(picture, one.scene, thing, t) > 20, (one.scene.index, question)
            else:
                ground = np.abs(picture.astype(int) - GROUNDS[question.answer]).max(axis=-1) <= 2
                assert ground.mean() > 0.3, (one.scene.index, question)


# -- Pixels ------------------------------------------------------------------------------------


def test_frames_show_what_the_tracks_say(asked):
    rng = np.random.default_rng(0)
    shown = hidden = signs = 0
    for one in asked[:300]:
        scene = one.scene
        t = float(rng.uniform(0, scene.duration_s))
        picture = frame(scene, t)
        assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
        for thing in scene.things:
            others = [other for other in scene.things if other.id != thing.id]
            without = frame(dataclasses.replace(scene, things=others), t)
            x, y = at(thing.position, t) - at(scene.camera, t)
            if not is_visible(thing, t):
                assert np.array_equal(without, picture), "a thing that is off is drawn"
                hidden += 1
            elif 0.1 < x < 0.9 and 0.1 < y < 0.9:
                assert not np.array_equal(without, picture)
                assert painted(picture, scene, thing, t) > 10, (scene.index, t, thing.name)
                shown += 1
                if thing.kind == "sign":
                    plate = (np.abs(picture.astype(int) - (8, 8, 10)).max(axis=-1) <= 1).sum()
                    assert plate > 300, (scene.index, t, thing.name)
                    signs += 1
    assert min(shown, hidden, signs) > 20, "the scenes drawn are too few to prove anything"


def test_variable_rates_vary_and_times_increase(asked):
    for one in asked[:500]:
        steps = np.diff(frame_times(one.scene))
        assert (steps > 0).all() and frame_times(one.scene)[-1] < one.scene.duration_s
        nearly_constant = np.ptp(steps) < 1e-6
        assert nearly_constant != one.scene.variable_rate


@pytest.mark.parametrize("variable_rate", [False, True])
def test_file_has_every_frame_at_its_time(tmp_path, asked, variable_rate):
    one = next(
        one
        for one in asked
        if one.scene.duration_s < 6 and one.scene.variable_rate == variable_rate
    )
    path: Path = tmp_path / "scene.mp4"
    write_video(one.scene, path)
    with av.open(str(path)) as container:
        decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    times = frame_times(one.scene)
    assert len(decoded) == len(times)
    np.testing.assert_allclose([time for time, _ in decoded], times, atol=1 / 90000)
    for i in (0, len(times) // 2, len(times) - 1):
        error = np.abs(decoded[i][1].astype(int) - frame(one.scene, float(times[i])))
        assert np.median(error) <= 4, "the file shows another picture"


# -- Words -------------------------------------------------------------------------------------


def told_events(texts: list[str]) -> Counter:
    """(thing, what it does) of every event sentence in these lines, camera legs left out."""
    out: Counter = Counter()
    for sentence in (s for text in texts for s in text.rstrip(".").split(". ")):
        words = sentence.split()
        if words[0] == "sign":
            out[words[1], "sign"] += 1
        elif words[0] == "passes":
            out[words[2], "pass"] += 1
        elif len(words) > 1 and words[0] != "camera" and words[1] in ACTIONS:
            out[words[0], words[1]] += 1
    return out


def test_each_event_is_told_once(asked):
    for one in asked[:600]:
        scene = one.scene
        starts = np.arange(0, scene.duration_s, 2.0)
        spans = np.stack([starts, starts + 2], axis=1)
        events = one.happened + passes(scene)
        seen = Counter((scene.things[event.thing].name, event.kind) for event in events)
        assert told_events(lines(scene, spans)) == seen, scene.index
        apart = told_events(lines(scene, spans[::2]))
        assert all(apart[key] <= seen[key] for key in apart), scene.index


def test_transcripts_tell_the_clips_and_every_sign(asked):
    for one in asked[:600]:
        starts = np.arange(0, one.scene.duration_s, 2.0)
        text = transcript(one.scene, np.stack([starts, starts + 2], axis=1))
        head, *clips = text.split("\n")
        assert head == f"{one.scene.ground} ground."
        assert len(clips) == len(starts)
        assert clips[0].startswith("clip from 00:00-00:02: ")
        for sign in (thing for thing in one.scene.things if thing.kind == "sign"):
            assert f"sign {sign.name} in {sign.colour}." in text, (one.scene.index, text)


def test_brief_transcripts_tell_the_same_with_fewer_words(asked):
    shorter = 0
    for one in asked[:300]:
        spans = clip_spans(one.scene.duration_s)
        known: dict[str, str] = {}
        for full, brief in zip(lines(one.scene, spans), lines(one.scene, spans, True), strict=True):
            states = {
                s.split()[3 if " dotted" in s or " striped" in s else 2]: s
                for s in full[:-1].split(". ")
                if s.startswith(("small ", "big "))
            }
            told = brief[:-1].split(". ")
            for name, state in states.items():
                assert (state in told) == (known.get(name) != state), (one.scene.index, full)
            known |= states
            rest = [s for s in full[:-1].split(". ") if s not in states.values()]
            assert [s for s in told if s not in states.values() and s != "nothing"] == [
                s for s in rest if s != "nothing"
            ]
            shorter += len(brief) < len(full)
    assert shorter > 300


def test_lists_agree_with_the_questions(asked):
    seen = Counter()
    for one in asked[:600]:
        listed = {
            request: [] if answer == "none." else answer[:-1].split(". ")
            for request, answer in listing.lists(one.scene, clip_spans(one.scene.duration_s))
        }
        for question in one.questions if listed else ():
            family, query = question.family, question.query
            if family == "sign_ordinal":
                assert listed["List the signs."][query["index"]] == question.answer
            elif family == "sign_count":
                assert str(len(listed["List the signs."])) == question.answer
                assert len(listed["Number the signs."]) == min(int(question.answer), len(ORDINALS))
            elif family == "sign_when":
                told = f"{query['sign']} {question.answer}"
                assert told in listed["List the signs with their times."]
            elif family == "event_after":
                events = listed["List the events."]
                assert events[events.index(query["event"]) + 1] == question.answer
                assert listed["List the events, the last first."] == events[::-1]
            elif family == "camera_count":
                assert str(len(listed["List the moves of the camera."])) == question.answer
            elif family == "pass_ordinal":
                assert listed["List the passed things."][query["index"]] == question.answer
            elif family == "place_end":
                name = one.scene.things[query["thing"]].name
                assert f"{name} {question.answer}" in listed["Where is everything at the end?"]
            else:
                continue
            seen[family] += 1
    assert len(seen) == 7 and min(seen.values()) >= 10, seen


def read_drill(text: str) -> dict[str, str]:
    """The words of a drill's transcript, and when each is shown."""
    when = {}
    for line in text.split("\n"):
        time, _, words = line.removeprefix("clip from ").partition(": ")
        when |= {word: time for word in words[:-1].split(". ") if word != "nothing"}
    return when


def test_drills_answer_themselves():
    counted = dict(zip(drills.COUNTED, range(9), strict=True))
    for index in range(300):
        user, *turns = drills.drill(0, index, most_items=2 + index % 8, num_questions=4)
        transcript, _, first = user["content"].rpartition("\n")
        when = read_drill(transcript)
        words = list(when)
        after = dict(pairwise(words))
        before = {second: first for first, second in after.items()}
        places = dict(zip(words, counted, strict=False))
        each = {
            "Which is each?": places,
            "When is each?": when,
            "What is right after each?": after,
            "What is right before each?": before,
        }
        true = {"List all.": ". ".join(words) + ".", "How many?": str(len(words))}
        true["List all, the last first."] = ". ".join(words[::-1]) + "."
        true |= {f"What is {name}?": word for word, name in places.items()}
        true |= {f"When is {word}?": time for word, time in when.items()}
        true |= {f"What is right after {one}?": other for one, other in after.items()}
        true |= {f"What is right before {one}?": other for one, other in before.items()}
        asked = [first, *(m["content"] for m in turns[1::2])]
        assert set(each) <= set(asked)
        for request, answer in zip(asked, (m["content"] for m in turns[::2]), strict=True):
            if request in each:
                told = dict(pair.split(" ") for pair in answer[:-1].split(". "))
                assert told == each[request], (user, request)
            else:
                assert answer == true[request], (user, request)


def test_what_is_asked_of_each_agrees_with_the_questions(asked):
    told = {
        "sign_after": ("Which sign is right after each?", "{sign} {answer}"),
        "sign_before": ("Which sign is right before each?", "{sign} {answer}"),
        "sign_when": ("When is each sign shown?", "{sign} {answer}"),
        "event_after": ("What happens right after each?", "{event}: {answer}"),
        "event_before": ("What happens right before each?", "{event}: {answer}"),
        "event_when": ("When does each happen?", "{event}: {answer}"),
        "colour_before": ("Which colour is each at first?", "{name} {answer}"),
        "action_count": ("How many times does each do it?", "{name} {kind}: {answer}"),
        "stay_duration": ("How many seconds is each in view?", "{name} {answer}"),
    }
    seen = Counter()
    for one in asked[:600]:
        answers = dict(listing.each_of(one.scene, np.random.default_rng(0)))
        for question in one.questions if answers else ():
            if question.family in told:
                request, form = told[question.family]
                thing = question.query.get("thing")
                name = "" if thing is None else one.scene.things[thing].name
                line = form.format(**question.query, answer=question.answer, name=name)
                assert line in answers[request][:-1].split(". "), (one.scene.index, line)
                seen[question.family] += 1
    assert seen.keys() == told.keys() and min(seen.values()) >= 10, seen


def test_scene_drills_tell_the_scene_they_ask_about():
    for index in range(100):
        user, *turns = drills.scene_drill(0, index)
        assert user == drills.scene_drill(0, index)[0]
        assert user["content"].count("clip from") <= 10  # 20 s
        requests = [user["content"].split("\n")[-1], *(m["content"] for m in turns[1::2])]
        assert 1 <= len(requests) == len(set(requests)) <= 12


def test_captions_name_what_is_on(asked):
    for one in asked[:300]:
        t = one.scene.duration_s / 3
        text = caption(one.scene, t)
        for shape in one.scene.shapes:
            x, y = at(shape.position, t)
            on = is_visible(shape, t) and 0 <= x <= 1 and 0 <= y <= 1
            assert bool(re.search(rf"\b{shape.name}\b", text)) == on, (one.scene.index, text)


# -- A made world ------------------------------------------------------------------------------


def write_world(world_dir: Path, asked: list[Asked], spoil: dict | None = None) -> int:
    """Write the files that `check_world` reads; `spoil` replaces keys of the first question."""
    count = 0
    for number, one in enumerate(asked):
        scene = dataclasses.asdict(one.scene) | {"video": f"{number}.mp4", "split": "train"}
        append_jsonl(world_dir / "scenes.jsonl", scene)
        for question in one.questions:
            row = {
                "question_id": f"q{count}",
                "question": question.question,
                "options": question.options(count % 4),
                "answer": count % 4,
                "family": question.family,
                "query": question.query,
                "scene": number,
            }
            append_jsonl(world_dir / "questions.jsonl", row | (spoil or {} if count == 0 else {}))
            count += 1
    return count


def test_check_world_passes_a_good_world(tmp_path, asked):
    count = write_world(tmp_path, asked[:10])
    report = check_world(tmp_path)
    assert (report.num_scenes, report.num_questions, report.mismatches) == (10, count, [])


def test_a_made_world_is_right_and_the_same_every_time(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, workers in zip(folders, (1, 2), strict=True):
        make_world(folder, num_videos=4, seed=3, workers=workers)
    report = check_world(folders[0])
    assert report.num_scenes == 4 and report.num_questions > 0 and not report.mismatches
    names = [path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file()]
    assert len(names) > 4
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ({"answer": 1}, "the tracks say"),
        ({"answer": 4}, "four different options"),
        ({"options": ["red", "red", "blue", "green"]}, "four different options"),
        ({"scene": 99}, "asks of scene 99"),
        ({"family": "riddles"}, "cannot check questions of the family 'riddles'"),
        ({"family": "sign_ordinal", "query": {"index": 9}}, "position 9 asked of"),
    ],
)
def test_check_world_names_the_bad_question(tmp_path, asked, spoil, complaint):
    write_world(tmp_path, asked[:3], spoil)
    mismatches = check_world(tmp_path).mismatches
    assert len(mismatches) == 1
    assert mismatches[0].startswith("q0 (") and complaint in mismatches[0]


def test_check_world_says_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*scenes.jsonl"):
        check_world(tmp_path)
    append_jsonl(tmp_path / "scenes.jsonl", {"index": 0})
    with pytest.raises(ValueError, match="lacks 'seed'"):
        check_world(tmp_path)
