"""Who answers: Apollo (to the same bit in any company), transformers, servers, baselines."""

import base64
import io
import json
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import (
    TOKENIZER,
    make_config,
    make_llm_config,
    make_model,
    make_tokenizer,
)

from apollo.chat import VideoChat, load_model
from apollo.eval import api, local, prompts, watching
from apollo.eval.answerers import (
    Answer,
    choose,
    kind_and_model,
    make_answerer,
    pick_scoring,
)
from apollo.eval.api import ApiAnswerer, ApiError
from apollo.eval.huggingface import HuggingFaceAnswerer
from apollo.eval.local import ApolloAnswerer
from apollo.eval.questions import Question
from apollo.media import load_video
from apollo.model import ApolloProcessor
from apollo.model.likelihood import Row, log_probabilities, read_prefix
from apollo.video import VideoClips, VideoError, VideoLimitError, VideoNotFoundError

WORDS = "when the red ball that moves left at first stops beside a sign which one is it".split()
OPTIONS = ("a ball", "the red cube", "x", "it moves to the left side", "no")
SUBTITLES = "1\n00:00:01,000 --> 00:00:02,000\nHello.\n\n2\n00:00:05,500 --> 00:00:06,500\nThere!\n"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A random model whose LLM is sure of what it says, so that scores differ."""
    folder = tmp_path_factory.mktemp("tiny")
    config = make_config(text_config=make_llm_config(initializer_range=0.5))
    make_model(config).save_pretrained(folder)
    ApolloProcessor.from_config(config, TOKENIZER, max_clips=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(plain_video) -> list[Question]:
    """Questions of lengths that pad to different ones, with 2 to 5 options."""
    return [
        Question(
            question_id=f"q{number}",
            video=plain_video.path,
            question=" ".join(WORDS[: 1 + number]) + "?",
            options=OPTIONS[: 2 + number % 4],
            answer=number % 2,
        )
        for number in range(14)
    ]


def ask(answerer, questions, condition) -> list[Answer]:
    return answerer.answer(questions, condition, answerer.watch(questions[0], condition))


# ---- what all have in common ---------------------------------------------------------------------


def test_oracle_is_right_and_random_is_the_same_everywhere(asked):
    oracle = make_answerer("oracle", scoring="letter")
    assert [a.prediction for a in ask(oracle, asked, "video")] == [q.answer for q in asked]
    guesser = make_answerer("random", scoring="option", batch_size=3)
    guesses = ask(guesser, asked, "text")
    assert guesses == [ask(guesser, [question], "text")[0] for question in asked]
    assert guesses != ask(guesser, asked, "video")
    # A guess is of the ids alone; this one was drawn once and must never change.
    assert guesses[0].option_scores == [0.2024, 0.7158]
    assert all(a.prediction == choose(a.option_scores) for a in guesses)


def test_the_first_of_equal_scores_is_chosen():
    assert [choose([1.0, 2.0, 2.0]), choose([-3.0, -3.0]), choose([0.0])] == [1, 0, 0]


def test_names_of_answerers():
    assert kind_and_model("oracle") == ("oracle", "")
    assert kind_and_model("api:gpt:4o/x") == ("api", "gpt:4o/x")
    assert kind_and_model("runs/x/model") == ("apollo", "runs/x/model")
    with pytest.raises(ValueError, match="huggingface:MODEL"):
        kind_and_model("huggingface:")
    assert pick_scoring("api:x", None, "letter") == "generate"
    assert pick_scoring("micro", None, "option") == "option"
    assert pick_scoring("huggingface:x", None, "option") == "letter"
    with pytest.raises(ValueError, match="letter, generate"):
        pick_scoring("huggingface:x", "option", "letter")
    with pytest.raises(ValueError, match="a server tells no likelihoods"):
        make_answerer("api:x", scoring="letter")
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_answerer("oracle", scoring="letter", batch_size=0)
    with pytest.raises(ValueError, match="no such folder"):
        make_answerer("nothing", scoring="letter")


# ---- an Apollo model -----------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["video", "text"])
@pytest.mark.parametrize("scoring", ["letter", "option"])
def test_answers_are_the_same_bits_in_any_company(model_dir, asked, scoring, condition):
    answerer = ApolloAnswerer(model_dir, scoring)
    seen = answerer.watch(asked[0], condition)
    shuffled = [asked[index] for index in np.random.default_rng(0).permutation(len(asked))]
    found = []
    for batch_size in (1, 4, 16):
        answerer.batch_size = batch_size
        for questions in (asked, shuffled, asked[3:4] + asked[::-1]):
            answers = answerer.answer(questions, condition, seen)
            found.append({q.question_id: a for q, a in zip(questions, answers, strict=True)})
    assert all(answers == found[0] for answers in found)
    assert len({tuple(answer.option_scores) for answer in found[0].values()}) == len(asked)


@pytest.mark.parametrize("condition", ["video", "frame"])
def test_features_are_kept_for_models_with_the_same_encoders(
    model_dir, asked, condition, tmp_path, monkeypatch
):
    cache = tmp_path / "features"
    plain, first = ApolloAnswerer(model_dir), ApolloAnswerer(model_dir, feature_cache=cache)
    assert first.identity != plain.identity
    answers = ask(first, asked, condition)
    for one, other in zip(answers, ask(plain, asked, condition), strict=True):
        assert one.option_scores == pytest.approx(other.option_scores, abs=1e-2)
        assert one.frame_times_s == other.frame_times_s
        assert one.num_prompt_tokens == other.num_prompt_tokens
    second = ApolloAnswerer(model_dir, feature_cache=cache)
    for parameter in second.model.lm_head.parameters():
        parameter.data *= 0.5  # another LLM
    third = ApolloAnswerer(model_dir, feature_cache=cache)
    for answerer in (second, third):
        monkeypatch.setattr(answerer, "_encode", lambda _: pytest.fail("encoded again"))
        monkeypatch.setattr(answerer, "_watcher", lambda *_: pytest.fail("decoded again"))
    assert ask(third, asked, condition) == answers
    assert ask(second, asked, condition) != answers
    gone = replace(asked[0], video=tmp_path / "gone.mp4")
    with pytest.raises(VideoError):
        first.watch(gone, condition)
    for path in cache.rglob("*.safetensors"):
        path.write_bytes(b"broken")
    assert ask(first, asked, condition) == answers


def test_features_of_other_encoders_are_not_taken(model_dir, asked, tmp_path):
    first = ApolloAnswerer(model_dir, feature_cache=tmp_path)
    ask(first, asked, "video")
    first.model.parts()["encoders"][0].requires_grad_(False).apply(
        lambda module: [p.mul_(2) for p in module.parameters(recurse=False)]
    )
    first.model.save_pretrained(tmp_path / "other")
    first.processor.save_pretrained(tmp_path / "other")
    other = ApolloAnswerer(tmp_path / "other", feature_cache=tmp_path)
    assert isinstance(other.watch(asked[0], "video"), VideoClips)


def plain_scores(chat: VideoChat, seen, question: Question, scoring: str, condition: str):
    """Each option by itself: whole conversation, pixels in, no cache, no padding."""
    media = {
        "video": lambda: [{"type": "video", "video": seen}],
        "frame": lambda: [{"type": "image", "image": seen.frames[0, 0]}],
        "text": list,
    }[condition]()
    text = {"type": "text", "text": prompts.question_text(question, scoring)}
    scores = []
    for letter, option in zip("ABCDE", question.options, strict=False):
        written = letter if scoring == "letter" else option
        messages = [
            {"role": "user", "content": [*media, text]},
            {"role": "assistant", "content": written},
        ]
        batch = chat.processor([messages], with_labels=True)
        labels = batch.pop("labels")[0]
        with torch.inference_mode():
            log_shares = chat.model(**batch).logits[0].log_softmax(-1)
        places = (labels != -100).nonzero()[:, 0][: 1 if scoring == "letter" else None]
        scores.append(float(log_shares[places - 1, labels[places]].sum()))
    return scores


@pytest.mark.parametrize("condition", ["video", "frame", "text"])
@pytest.mark.parametrize("scoring", ["letter", "option"])
def test_scores_are_those_of_one_option_at_a_time(model_dir, asked, scoring, condition):
    """Sharing a prefix, features and rows changes the speed, not the scores."""
    answerer = ApolloAnswerer(model_dir, scoring)
    chat = VideoChat(answerer.model, answerer.processor)
    seen = answerer.watch(asked[0], condition)
    for question, answer in zip(asked, answerer.answer(asked, condition, seen), strict=True):
        expected = plain_scores(chat, seen, question, scoring, condition)
        assert answer.option_scores == pytest.approx(expected, abs=2e-4)
        assert answer.status == "ok" and answer.prediction == int(np.argmax(expected))


def test_a_row_equals_each_text_by_itself():
    model = make_model(make_config(text_config=make_llm_config(initializer_range=0.5)))
    prefix_ids = [40, 41, 42]
    rows = [
        Row([50], [[60]]),
        Row([50, 51], [[60], [61, 62, 63], [61, 62], [60, 70]]),
        Row(list(range(30, 60)), [[61] * 20, [62]]),
    ]
    prefix = read_prefix(model, prefix_ids)
    before = [layer.keys.clone() for layer in prefix.layers]
    found = log_probabilities(model, prefix, rows, batch_size=2)
    for row, scores in zip(rows, found, strict=True):
        for text, score in zip(row.texts, scores, strict=True):
            ids = torch.tensor([[*prefix_ids, *row.prompt, *text]])
            with torch.inference_mode():
                log_shares = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(prefix_ids) + len(row.prompt)
            expected = sum(log_shares[start + i - 1, token] for i, token in enumerate(text))
            assert score == pytest.approx(float(expected), abs=1e-4)
    # Reading on from the prefix must not have changed it.
    for layer, keys in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_a_question_that_merges_with_what_is_before_it(model_dir, asked):
    """A tokenizer may join the line break before a question with its own beginning."""
    answerer = ApolloAnswerer(model_dir)
    prefix = answerer._read(local._Shown(text="words\n"))[0]
    plain = answerer._prompts(local._Shown(text="words\n"), ["hello", "bye"])
    assert [local.num_shared(prefix, ids) for ids in plain] == [len(prefix)] * 2
    short = [ids[:4] + [7] + ids[5:] for ids in plain]  # as if four tokens were shared
    expected = answerer._scores(*_read_alone(answerer, short[0]), asked[:1], short[:1])
    shared = answerer._read(local._Shown(text="words\n"))
    assert answerer._scores(*shared, asked[:2], short)[0] == pytest.approx(expected[0], abs=2e-4)


def _read_alone(answerer, ids):
    return ids[:2], read_prefix(answerer.model, ids[:2])


def test_generated_answers_are_those_of_a_chat(model_dir, asked):
    answerer = ApolloAnswerer(model_dir, "generate")
    chat = VideoChat(answerer.model, answerer.processor)
    answers = ask(answerer, asked[:3], "video")
    clips = load_video(asked[0].video, answerer.processor)
    for question, answer in zip(asked, answers, strict=False):
        text = prompts.question_text(question, "generate")
        content = [{"type": "video", "video": clips}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        assert answer.text == chat.generate(messages, max_new_tokens=local.MAX_ANSWER_TOKENS)
        assert answer.option_scores == [] and 0 < answer.num_answer_tokens <= 32
        prompt = chat.processor(messages, add_generation_prompt=True)["input_ids"]
        assert answer.num_prompt_tokens == prompt.shape[1]


def test_shuffled_frames_keep_their_times_in_the_prompt(model_dir, asked):
    answerer = ApolloAnswerer(model_dir)
    video, shuffled, again = (
        answerer.watch(asked[0], condition) for condition in ("video", "shuffled", "shuffled")
    )
    assert (shuffled.spans_s == video.spans_s).all()
    assert (shuffled.times_s != video.times_s).any()
    assert (np.sort(shuffled.times_s.ravel()) == np.sort(video.times_s.ravel())).all()
    frame_of = dict(zip(video.times_s.ravel(), video.frames.reshape(16, -1), strict=True))
    pairs = zip(shuffled.times_s.ravel(), shuffled.frames.reshape(16, -1), strict=True)
    assert all((frame_of[time_s] == frame).all() for time_s, frame in pairs)
    for index, square in enumerate(video.squares):
        order = [list(video.times_s.ravel()).index(t) for t in shuffled.times_s.ravel()]
        flat = square.reshape(16, -1)
        assert (shuffled.squares[index].reshape(16, -1) == flat[order]).all()
    assert (again.times_s == shuffled.times_s).all()
    other = answerer.watch(replace(asked[0], video_id="another"), "shuffled")
    assert (other.times_s != shuffled.times_s).any()
    shown = [local._Shown(local._medium(seen, "video")) for seen in (video, shuffled)]
    assert answerer._prompts(shown[0], ["?"]) == answerer._prompts(shown[1], ["?"])
    answers = [answerer.answer(asked, "video", seen) for seen in (video, shuffled)]
    assert answers[0][0].option_scores != answers[1][0].option_scores
    assert answers[1][0].frame_times_s == shuffled.times_s.round(3).tolist()


def test_conditions_show_what_they_say(model_dir, asked, plain_video, tmp_path):
    answerer = ApolloAnswerer(model_dir)
    video, frame, text = (ask(answerer, asked, c)[0] for c in ("video", "frame", "text"))
    assert np.shape(video.frame_times_s) == (4, 4)
    duration_s = float(plain_video.times_s[-1]) + 1 / 30
    assert frame.frame_times_s[0][0] == pytest.approx(duration_s / 2, abs=1 / 30)
    assert text.frame_times_s == []
    assert len({tuple(answer.option_scores) for answer in (video, frame, text)}) == 3
    assert video.num_prompt_tokens > frame.num_prompt_tokens > text.num_prompt_tokens
    gone = replace(asked[0], video=tmp_path / "gone.mp4")
    assert ask(answerer, [gone], "text")[0] == text
    for condition in ("video", "frame", "shuffled"):
        with pytest.raises(VideoError):
            answerer.watch(gone, condition)


@pytest.mark.parametrize("scoring", ["letter", "generate"])
def test_captions_are_written_first_and_answered_from(model_dir, asked, monkeypatch, scoring):
    monkeypatch.setattr(local, "MAX_CAPTION_TOKENS", 12)
    answerer = ApolloAnswerer(model_dir, scoring)
    chat = VideoChat(answerer.model, answerer.processor)
    captioned = [replace(q, caption_prompt="Describe it.") for q in asked[:2]]
    answers = ask(answerer, [*captioned, asked[0]], "video")
    clips = load_video(asked[0].video, answerer.processor)
    content = [{"type": "video", "video": clips}, {"type": "text", "text": "Describe it."}]
    caption = chat.generate([{"role": "user", "content": content}], max_new_tokens=12)
    assert answers[2] == ask(answerer, asked[:1], "video")[0]
    for question, answer in zip(captioned, answers, strict=False):
        asked_text = f"Caption: {caption}\n{prompts.question_text(question, scoring)}"
        messages = [{"role": "user", "content": asked_text}]
        if scoring == "letter":
            assert answer.text == caption
            written_out = f"Caption: {caption}\n{question.question}"
            asked_alone = replace(question, question=written_out, caption_prompt="")
            alone = ask(answerer, [asked_alone], "text")[0]
            assert answer.option_scores == pytest.approx(alone.option_scores, abs=2e-4)
        else:
            assert answer.text == "\n".join(
                filter(None, (caption, chat.generate(messages, local.MAX_ANSWER_TOKENS)))
            )
        assert answer.frame_times_s == answers[2].frame_times_s
        assert answer.num_answer_tokens >= 1


def test_subtitles_of_what_is_shown(model_dir, asked, tmp_path, monkeypatch):
    path = tmp_path / "a.srt"
    path.write_text(SUBTITLES)
    question = replace(asked[0], subtitles=path)
    answerer = ApolloAnswerer(model_dir)
    texts = []
    tokenize = answerer._prompts
    monkeypatch.setattr(
        answerer,
        "_prompts",
        lambda shown, asked: texts.append(shown.text) or tokenize(shown, asked),
    )
    header = "This video's subtitles are listed below:\n"
    expected = {
        "video": header + "Hello.\n",  # clips of 2 s from 0, 3.3, 6.7 and 10 s
        "frame": header + "There!\n",
        "text": header + "Hello.\nThere!\n",
    }
    for condition, text in expected.items():
        texts.clear()
        with_subtitles, without = ask(answerer, [question, asked[0]], condition)
        assert set(texts) == {text, ""}
        assert with_subtitles.option_scores != without.option_scores
        assert without == ask(answerer, [asked[0]], condition)[0]
    early = replace(question, subtitles_from_s=1000.0)
    assert prompts.subtitles_text(early, None) == header + "Hello.\nThere!\n"
    assert prompts.subtitles_text(early, [(0.0, 12.0)]) == ""


def test_a_prompt_beyond_the_context_is_refused(model_dir, asked, tmp_path):
    path = tmp_path / "a.srt"
    path.write_text(SUBTITLES.replace("Hello.", "Hello. " * 50))
    answerer = ApolloAnswerer(model_dir)
    answerer.model.config.text_config.max_position_embeddings = 300
    assert ask(answerer, asked[:1], "text")[0].status == "ok"
    with pytest.raises(ValueError, match="needs .* context has 300; evaluate without subtitles"):
        ask(answerer, [replace(asked[0], subtitles=path)], "text")
    long = replace(asked[0], question="why " * 100, question_id="long")
    with pytest.raises(ValueError, match="question 'long' needs"):
        ask(answerer, [asked[1], long], "text")


def test_letters_must_be_what_the_turn_begins_with(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    changed = text.replace("{%- generation -%}{{-", '{%- generation -%}{{- "> " +')
    assert changed != text
    template.write_text(changed)
    with pytest.raises(ValueError, match="use --scoring option"):
        ApolloAnswerer(folder)
    ApolloAnswerer(folder, "option")


def test_identity_is_of_what_answers_depend_on(model_dir, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    identity = ApolloAnswerer(model_dir, batch_size=1).identity
    assert ApolloAnswerer(copy, batch_size=7).identity == identity
    assert str(tmp_path) not in json.dumps(identity)
    assert ApolloAnswerer(copy, "option").identity != identity
    assert ApolloAnswerer(copy, dtype="bfloat16").identity["dtype"] == "bfloat16"
    model, processor = load_model(model_dir)
    processor.max_clips = 3
    processor.save_pretrained(copy)
    assert ApolloAnswerer(copy).identity["sampling"] != identity["sampling"]
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    assert ApolloAnswerer(copy).identity["weights"] != identity["weights"]
    with pytest.raises(ValueError, match="choose from float32"):
        ApolloAnswerer(copy, dtype="int8")


# ---- models of transformers ----------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory) -> Path:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**small, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=make_llm_config(vocab_size=len(tokenizer), initializer_range=0.5),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_a_model_of_transformers(llava_dir, asked):
    answerer = HuggingFaceAnswerer(llava_dir, num_frames=3)
    by_condition = {c: ask(answerer, asked[:4], c) for c in ("video", "frame", "text", "shuffled")}
    assert len({tuple(a[0].option_scores) for a in by_condition.values()}) == 4
    assert by_condition["video"] == [ask(answerer, [q], "video")[0] for q in asked[:4]]
    assert np.shape(by_condition["video"][0].frame_times_s) == (3, 1)
    # The same by hand, images given to the processor as its documentation says.
    tokenizer, processor = answerer.processor.tokenizer, answerer.processor
    frames = answerer.watch(asked[0], "video").frames[:, 0]
    prompt = f"user: {'<image>' * 3}{prompts.question_text(asked[0], 'letter')}\nassistant:"
    inputs = processor(images=[Image.fromarray(f) for f in frames], text=prompt)
    inputs = {name: torch.as_tensor(np.array(value)) for name, value in inputs.items()}
    with torch.inference_mode():
        log_shares = answerer.model(**inputs).logits[0, -1].log_softmax(-1)
    ids = tokenizer(["A", "B"], add_special_tokens=False)["input_ids"]
    expected = [float(log_shares[i[0]]) for i in ids]  # " A" is two tokens here
    assert by_condition["video"][0].option_scores == pytest.approx(expected, abs=1e-4)
    assert by_condition["video"][0].num_prompt_tokens == inputs["input_ids"].shape[1]
    assert answerer.identity["sampling"]["num_frames"] == 3


def test_a_model_of_transformers_writes(llava_dir, asked, monkeypatch):
    monkeypatch.setattr("apollo.eval.huggingface.MAX_CAPTION_TOKENS", 7)
    answerer = HuggingFaceAnswerer(llava_dir, "generate", num_frames=2)
    plain, captioned = ask(answerer, [asked[0], replace(asked[0], caption_prompt="Say.")], "video")
    assert plain.option_scores == [] and 0 < plain.num_answer_tokens <= 32
    assert 7 <= captioned.num_answer_tokens <= 39 and captioned.text != plain.text


def test_apollo_through_the_auto_classes(model_dir, asked):
    """Its frames are images then; without any, it is the very same model."""
    there = HuggingFaceAnswerer(model_dir, num_frames=2)
    assert ask(there, asked[:2], "video")[0].status == "ok"
    here = ApolloAnswerer(model_dir)
    for condition in ("text", "frame"):
        pairs = zip(ask(there, asked[:3], condition), ask(here, asked[:3], condition), strict=True)
        for one, other in pairs:
            assert one.option_scores == pytest.approx(other.option_scores, abs=2e-4)


def test_a_processor_of_videos_gets_one_with_its_times(llava_dir, asked):
    answerer = HuggingFaceAnswerer(llava_dir, num_frames=3)
    answerer.takes_videos = True
    seen = answerer.watch(asked[0], "shuffled")
    media = answerer._media(seen, "shuffled")
    assert media.parts == [{"type": "video"}]
    assert (
        media.inputs["videos"][0] is seen.frames[:, 0].base
        or (media.inputs["videos"][0] == seen.frames[:, 0]).all()
    )
    metadata = media.inputs["video_metadata"][0]
    times_s = np.array(metadata["frames_indices"]) / metadata["fps"]
    assert times_s == pytest.approx(np.sort(seen.times_s[:, 0]), abs=1e-6)
    assert answerer._media(seen, "frame").parts == [{"type": "image"}] * 3


def test_models_that_cannot_be_used(llava_dir, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        HuggingFaceAnswerer("nothing")
    broken = shutil.copytree(llava_dir, tmp_path / "broken")
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="cannot load the model .* no chat template"):
        HuggingFaceAnswerer(broken)
    with pytest.raises(ValueError, match="num_frames is 0"):
        HuggingFaceAnswerer(llava_dir, num_frames=0)


# ---- servers -------------------------------------------------------------------------------------


class Server:
    """A server of chat completions that answers as the test says."""

    def __init__(self) -> None:
        self.requests: list[SimpleNamespace] = []
        self.reply = lambda number, body: (200, completion("B"), {})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = SimpleNamespace(path=self.path, headers=dict(self.headers), body=body)
                server.requests.append(request)
                code, reply, headers = server.reply(len(server.requests), body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def completion(text: str) -> dict:
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return {"choices": [{"message": {"content": text}}], "usage": usage}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Times that `post` would have slept."""
    waits: list[float] = []
    monkeypatch.setattr(api, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    return waits


def test_a_server_gets_frames_with_their_times(server, asked):
    answerer = ApiAnswerer("some/model", batch_size=2, server=server.url + "/", num_frames=3)
    answer = ask(answerer, asked[:1], "video")[0]
    assert answer.prediction == 1 and answer.text == "B" and answer.status == "ok"
    assert (answer.num_prompt_tokens, answer.num_answer_tokens) == (10, 2)
    assert answer.frame_times_s == [[2.0], [6.0], [10.0]]
    request = server.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == "Bearer sk-secret"
    assert (request.body["model"], request.body["temperature"]) == ("some/model", 0)
    content = request.body["messages"][0]["content"]
    kinds = [part["type"] for part in content]
    assert kinds == ["text", "image_url"] * 3 + ["text"]
    assert content[2]["text"] == "Frame at 6.0 s:"
    assert content[-1]["text"] == prompts.question_text(asked[0], "generate")
    header, data = content[1]["image_url"]["url"].split(",")
    assert header == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 32)
    assert "secret" not in json.dumps(answerer.identity) and server.url not in answerer.identity
    shuffled = answerer.watch(asked[0], "shuffled")
    assert [part.get("text") for part in shuffled.parts] == [p.get("text") for p in content[:-1]]
    assert ask(answerer, asked[:1], "text")[0].prediction == 1
    assert [p["type"] for p in server.requests[1].body["messages"][0]["content"]] == ["text"]


def test_a_server_gets_the_file(server, asked, tmp_path):
    answerer = ApiAnswerer("m", server=server.url, send="file")
    ask(answerer, asked[:1], "video")
    part = server.requests[0].body["messages"][0]["content"][0]
    assert part["type"] == "video_url"
    data = part["video_url"]["url"].removeprefix("data:video/mp4;base64,")
    assert base64.b64decode(data) == asked[0].video.read_bytes()
    with pytest.raises(VideoNotFoundError):
        answerer.watch(replace(asked[0], video=tmp_path / "no.mp4"), "video")


def test_answers_come_in_the_order_of_the_questions(server, asked):
    def reply(number, body):
        text = body["messages"][0]["content"][-1]["text"]
        number_of_words = len(text.splitlines()[0].split())
        time.sleep(0.02 * (number_of_words % 3))
        return 200, completion("AB"[number_of_words % 2]), {}

    server.reply = reply
    answers = [
        ask(ApiAnswerer("m", server=server.url, batch_size=size), asked, "text") for size in (1, 8)
    ]
    assert answers[0] == answers[1]
    assert [answer.prediction for answer in answers[0]] == [(n + 1) % 2 for n in range(14)]


def test_a_busy_server_is_asked_again(server, asked, waits):
    replies = [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "7"}),
        (503, b"<html>", {}),
        (200, completion("A"), {}),
    ]
    server.reply = lambda number, body: replies[number - 1]
    answer = ask(ApiAnswerer("m", server=server.url), asked[:1], "text")[0]
    assert answer.prediction == 0 and waits == [7.0, 2.0]
    server.reply = lambda number, body: (500, b"", {})
    with pytest.raises(ApiError, match=r"answers 500: .*\(tried 6 times"):
        ask(ApiAnswerer("m", server=server.url), asked[:1], "text")


def test_a_connection_that_breaks_is_tried_again(server, asked, waits, monkeypatch):
    monkeypatch.setattr(api, "TIMEOUT_S", 0.2)

    def reply(number, body):
        if number == 1:
            time.sleep(0.5)
        return 200, completion("B"), {}

    server.reply = reply
    assert ask(ApiAnswerer("m", server=server.url), asked[:1], "text")[0].prediction == 1
    assert waits == [1.0] and len(server.requests) == 2


@pytest.mark.parametrize(
    ("code", "reply", "headers", "message"),
    [
        (401, {"error": {"message": "bad key sk-secret\nno"}}, {}, r"401: bad key \*\*\* no$"),
        (404, {"error": "no model m"}, {}, "404: no model m; check --server"),
        (302, b"", {"Location": "http://elsewhere.invalid/"}, "302: .* final address"),
        (200, b"hello", {}, "not JSON"),
        (200, {"choices": []}, {}, "not with a chat completion"),
        (200, [1], {}, "not with a chat completion"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(server, asked, code, reply, headers, message):
    server.reply = lambda number, body: (code, reply, headers)
    with pytest.raises(ApiError, match=message) as error:
        ask(ApiAnswerer("m", server=server.url), asked[:6], "text")
    assert "\n" not in str(error.value) and "sk-secret" not in str(error.value)


def test_no_server_and_no_key(asked, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ApiError, match="is the server running"):
        ask(ApiAnswerer("m", server=server.url), asked[:1], "text")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert api._advice(401, "").endswith("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="is no URL"):
        ApiAnswerer("m", server="localhost:8000")
    with pytest.raises(ValueError, match="choose from frames, file"):
        ApiAnswerer("m", send="pigeon")


def test_a_refused_request_costs_its_own_question(server, asked):
    refused = (400, {"error": {"message": "too long"}}, {})
    server.reply = lambda number, body: refused if number == 1 else (200, completion(""), {})
    answers = ask(ApiAnswerer("m", server=server.url, batch_size=1), asked[:2], "text")
    assert answers[0].prediction is None and answers[0].status.startswith("error: ")
    assert answers[0].status.endswith("400: too long")
    assert answers[1].prediction is None and answers[1].status == "empty"


def test_a_server_captions_first(server, asked):
    server.reply = lambda number, body: (200, completion(["A red cube.", "A"][number - 1]), {})
    question = replace(asked[0], caption_prompt="Describe it.")
    answer = ask(ApiAnswerer("m", server=server.url, num_frames=2), [question], "video")[0]
    assert answer.text == "A red cube.\nA" and answer.prediction == 0
    assert answer.num_prompt_tokens == 20
    second = server.requests[1].body["messages"][0]["content"]
    assert [part["type"] for part in second] == ["text"]
    assert second[0]["text"].startswith("Caption: A red cube.\n")


def test_a_video_that_hangs_the_decoder_is_given_up(model_dir, asked, monkeypatch):
    monkeypatch.setattr(watching, "VIDEO_TIME_LIMIT_S", 1e-4)
    with pytest.raises(VideoLimitError, match="took longer than 0.0001 s and was given up"):
        ApolloAnswerer(model_dir).watch(asked[0], "video")
