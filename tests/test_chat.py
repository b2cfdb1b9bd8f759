"""Loading models, asking and going on, and the two commands, with a tiny random model."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_config, make_model, make_processor

from apollo.chat import VideoChat, describe_clips, load_model
from apollo.cli import main
from apollo.media import sampling_of
from apollo.messages import MessageError
from apollo.video import ClipSampling, VideoNotFoundError, load_clips

OPTIONS = ["the red ball", "a blue cube", "none"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = make_config(note="is random.")
    make_model(config).save_pretrained(path)
    make_processor(config).save_pretrained(path)
    return path


@pytest.fixture
def chat(model_dir):
    return VideoChat.load(model_dir)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_sampling_is_the_models(chat):
    chat.processor.frames_per_clip, chat.processor.clip_duration_s = 2, 3.0
    assert sampling_of(chat.processor) == ClipSampling("fps", 2, 3.0, chat.processor.max_clips)


def test_several_turns_encode_the_video_once(chat, plain_video, monkeypatch):
    calls = []
    encode = chat.model.encode
    monkeypatch.setattr(chat.model, "encode", lambda pixels: calls.append(1) or encode(pixels))
    pieces = []
    first = chat.ask(plain_video.path, "What?", max_new_tokens=5, on_text=pieces.append)
    assert "".join(pieces).strip() == first.text
    second = chat.ask(None, "And then?", max_new_tokens=5)
    assert second.clips is first.clips and len(first.clips.frames) == 6
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert len(calls) == 1
    chat.ask(plain_video.path, "Anew?", max_new_tokens=2)
    assert len(chat.messages) == 2 and len(calls) == 2
    # What was said of the first video must not have changed anything.
    again = VideoChat(chat.model, chat.processor).ask(plain_video.path, "What?", max_new_tokens=5)
    assert again.text == first.text


def test_an_answer_depends_on_the_video(chat, plain_video):
    """Another video of the same shape gives other scores: the cached features are not mixed up."""
    dark = load_clips(plain_video.path, sampling_of(chat.processor))
    bright = type(dark)(**{**vars(dark), "frames": np.full_like(dark.frames, 255)})
    scores = [chat.ask(clips, "What?", OPTIONS).option_scores for clips in (dark, bright, dark)]
    assert scores[0] == scores[2] != scores[1]


@pytest.mark.parametrize("turns_before", [0, 1])
def test_option_scores_equal_the_training_loss(chat, plain_video, turns_before):
    """An option's score is minus the summed loss of the very labels that training uses."""
    clips = load_clips(plain_video.path, sampling_of(chat.processor))
    messages = [{"role": "user", "content": [{"type": "video", "video": clips}]}]
    if turns_before:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So?"}]
    scores = chat.score_options(messages, OPTIONS)
    for option, score in zip(OPTIONS, scores, strict=True):
        answer = {"role": "assistant", "content": option}
        batch = chat.processor([*messages, answer], with_labels=True)
        prompt = chat.processor(messages, add_generation_prompt=True)
        batch["labels"][:, : prompt["input_ids"].shape[1]] = -100  # earlier turns are no options
        with torch.inference_mode():
            loss = chat.model(**batch, num_items_in_batch=1).loss
        assert score == pytest.approx(-float(loss), rel=1e-4)


def test_options_choose_the_likeliest(chat, plain_video):
    answer = chat.ask(plain_video.path, "Which?", OPTIONS)
    assert answer.text == OPTIONS[int(np.argmax(answer.option_scores))]
    assert chat.messages[-1]["content"] == [{"type": "text", "text": answer.text}]
    # The order in which options are scored must not matter: each starts from the same prompt.
    messages = chat.messages[:-1]
    backwards = chat.score_options(messages, OPTIONS[::-1])[::-1]
    np.testing.assert_allclose(backwards, answer.option_scores, rtol=1e-5)


def test_generate_loads_what_messages_name(chat, plain_video, tmp_path):
    image = Image.new("RGB", (30, 20), "red")
    image.save(tmp_path / "red.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    answers = set()
    for source in (str(tmp_path / "red.png"), buffer.getvalue(), image):
        content = [
            {"type": "image", "image": source},
            {"type": "video_url", "video_url": {"url": plain_video.path.as_uri()}},
            {"type": "text", "text": "Same?"},
        ]
        answers.add(chat.generate([{"role": "user", "content": content}], max_new_tokens=4))
    assert len(answers) == 1
    with pytest.raises(ValueError, match="not an image"):
        chat.generate([{"role": "user", "content": [{"type": "image", "image": b"no"}]}])
    assert isinstance(chat.generate([{"role": "user", "content": "Hi"}], max_new_tokens=3), str)


def test_refused_questions_leave_the_conversation_alone(chat, plain_video):
    chat.ask(plain_video.path, "What?", max_new_tokens=2)
    before = list(chat.messages)
    with pytest.raises(MessageError, match="empty"):
        chat.ask(None, "  ")
    with pytest.raises(VideoNotFoundError):
        chat.ask("none.mp4", "What?")
    assert chat.messages == before


def test_models_that_are_not_there(tmp_path, model_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for model, reason in {
        "nothing": "no such folder",
        str(tmp_path / "none"): "no such folder",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "empty"): "no config.json",
    }.items():
        with pytest.raises(ValueError, match=reason):
            load_model(model)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="its type is qwen2"):
        load_model(other)
    (other / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot load the model") as error:
        load_model(other)  # a configuration without weights
    assert "\n" not in str(error.value)


def test_clips_are_described_in_full(plain_video):
    text = describe_clips(load_clips(plain_video.path, ClipSampling(max_clips=2)))
    assert text.splitlines()[1:] == [
        "  00:00-00:02  frames at 0.00 0.50 1.00 1.50 s",
        "  00:10-00:12  frames at 10.00 10.50 11.00 11.50 s",
    ]


# ---- the commands --------------------------------------------------------------------------------


def test_ask(model_dir, plain_video, capsys):
    arguments = ["ask", str(plain_video.path), "What?", "--model", str(model_dir)]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert "00:10-00:12" in out and "is random." in err
    assert main([*arguments, "--sampling", "center", "--options", *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "frames at 6.00 6.00 6.00 6.00 s" in out and out.splitlines()[-1] in OPTIONS
    assert out.count("%") == len(OPTIONS)


def test_chat(model_dir, plain_video, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\nAnd then?\n"))
    arguments = ["chat", str(plain_video.path), "--model", str(model_dir), "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("the question is empty") == 1


def test_mistakes_end_in_one_line(model_dir, plain_video, tmp_path, capsys):
    text = tmp_path / "text.mp4"
    text.write_text("no video " * 100)
    video = str(plain_video.path)
    for arguments in (
        [str(tmp_path / "none.mp4"), "What?"],
        [str(tmp_path), "What?"],
        [str(text), "What?"],
        [video, " "],
        [video, "What?", "--options", "one"],
        [video, "What?", "--model", str(tmp_path / "none")],
    ):
        assert main(["ask", "--model", str(model_dir), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("apollo: error: ") and err.count("\n") == 1
