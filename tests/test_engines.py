"""What vLLM's and SGLang's transformers backends ask of a model, and that it answers as ours.

The engines themselves need a GPU. `Engine` below does by hand what vLLM does with a processor and a
model (docs/engines.md says which version was read), in as few steps as possible.
"""

import json
import sys
import tomllib
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jinja2
import numpy as np
import pytest
import torch
from conftest import write_numbered_video
from tiny_models import (
    TOKENIZER,
    make_config,
    make_image,
    make_model,
    make_processor,
    make_video,
    user,
)
from transformers import AttentionInterface, AutoModel, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from apollo.chat import VideoChat
from apollo.media import load_video, sampling_of
from apollo.model import ApolloProcessor
from apollo.model.processing import CHAT_TEMPLATES
from apollo.model.video_processing import SAMPLERS, pack, unpack
from apollo.video import ClipSampling, open_video
from apollo.video.sampling import sample
from apollo.world.render import write_video
from apollo.world.scene import make_scene

ROOT = Path(__file__).parent.parent
QUESTION = "What happens first?"
VIDEO_TURN = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def micro():
    torch.set_num_threads(1)
    return VideoChat.load()


@pytest.fixture(scope="module")
def scene_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.mp4"
    scenes = (make_scene(3, index) for index in range(20))
    write_video(next(scene for scene in scenes if not scene.variable_rate), path)
    return path


@pytest.fixture
def processor():
    return make_processor(make_config(tokens_per_clip=16))


def decode(path, num_frames: int = -1):
    """Hand over a file as vLLM's loader does: `num_frames` uniform ones, or with -1 all of them."""
    with open_video(path) as video:
        fps = video.info.source_fps
        total = round(video.info.duration_s * fps)
        indices = np.arange(total)
        if num_frames > 0:
            indices = np.linspace(0, total - 1, min(num_frames, total), dtype=int)
        frames = video.frames_at((indices + 0.5) / fps).pixels
    return frames, {
        "total_num_frames": total,
        "fps": fps,
        "duration": total / fps,
        "video_backend": "opencv",
        "frames_indices": indices.tolist(),
    }


class Engine:
    """A processor and a model as vLLM's transformers backend uses them."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer

    def prompt(self, text, images=(), videos=()):
        """Return ids with the media's text in place, where features go, and the media's tensors."""
        dummy = self.processor.image_token * len(images) + self.processor.video_token * len(videos)
        media = {"images": list(images)} if images else {}
        if videos:
            frames, metadata = zip(*videos, strict=True)
            media |= {"videos": list(frames), "video_metadata": list(metadata)}
        output = self.processor(
            text=dummy,
            **media,
            do_sample_frames=True,
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        texts = {"image": [], "video": []}
        for entry in output.pop("text_replacement_offsets")[0]:
            texts[entry["type"]].append(self._ids(entry["replacement"]))
        ids, is_feature = [], []
        for token in self._ids(text):
            kind = {
                self.processor.image_token_id: "image",
                self.processor.video_token_id: "video",
            }.get(token)
            new = torch.tensor(texts[kind].pop(0) if kind else [token])
            ids.append(new)
            is_feature.append(new == new.mode().values if kind else torch.tensor([False]))
        assert not any(texts.values())
        for name in ("input_ids", "attention_mask"):
            output.pop(name)
        return torch.cat(ids), torch.cat(is_feature), output

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def features(self, media):
        """Return the tokens of each video; which rows are whose, `video_grid_thw` says."""
        rows, grid = media["pixel_values_videos"], media["video_grid_thw"]
        output = self.model.model.get_video_features(rows, return_dict=True, video_grid_thw=grid)
        tokens = output.pooler_output
        num_rows = grid.prod(-1).tolist()
        assert sum(num_rows) == len(rows)
        per_row = tokens.flatten(0, -2).shape[0] // len(rows)
        return tokens.flatten(0, -2).split([n * per_row for n in num_rows])

    @torch.inference_mode()
    def answer(self, text, videos, max_new_tokens=24):
        ids, is_feature, media = self.prompt(text, videos=videos)
        embed = self.model.model.get_input_embeddings()
        embeds = embed(ids.masked_fill(is_feature, 0))
        embeds[is_feature] = torch.cat(self.features(media))
        new: list[int] = []
        ends = self.model.generation_config.eos_token_id
        while len(new) < max_new_tokens and (not new or new[-1] not in np.atleast_1d(ends)):
            hidden = self.model.model(
                input_ids=None,
                inputs_embeds=embeds[None],
                position_ids=torch.arange(len(embeds))[None],
                use_cache=False,
                return_dict=False,
            )[0]
            new.append(int(self.model.lm_head(hidden[0, -1]).argmax()))
            embeds = torch.cat([embeds, embed(torch.tensor(new[-1:]))])
        return self.tokenizer.decode(new, skip_special_tokens=True).strip()


# ---- the same prompt, clips and pixels as ours ---------------------------------------------------


@pytest.mark.parametrize("prompt_format", list(CHAT_TEMPLATES))
@pytest.mark.parametrize(
    ("num_frames", "rate"), [(251, 30), (101, 25), (90, 30000 / 1001), (7, 24), (1, 10), (14, 1.5)]
)
def test_frames_give_what_the_file_gives(tmp_path, prompt_format, num_frames, rate):
    base = Fraction(rate).limit_denominator(1001)
    video = write_numbered_video(tmp_path / "v.mp4", range(num_frames), time_base=1 / base)
    sampling = {"paper": "fps", "released": "released"}[prompt_format]
    settings = {"prompt_format": prompt_format, "sampling": sampling, "max_clips": 4}
    processor = ApolloProcessor.from_config(make_config(), TOKENIZER, **settings)
    clips = load_video(video.path, processor)
    ours = processor([user(clips, QUESTION)], add_generation_prompt=True)
    text = processor.apply_chat_template(VIDEO_TURN, add_generation_prompt=True)
    frames, metadata = decode(video.path)
    theirs = processor(text=text, videos=[frames], video_metadata=[metadata])
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(theirs["pixel_values_videos"], pack(ours["pixel_values"]))
    assert theirs["video_grid_thw"].tolist() == [[len(clips.spans_s), 1, 1]]
    cut = processor.video_processor([frames], [metadata])["clips"][0]
    np.testing.assert_allclose(cut.spans_s, clips.spans_s, atol=1e-9)
    engine_ids, _, media = Engine(None, processor).prompt(text, videos=[(frames, metadata)])
    assert engine_ids.tolist() == ours["input_ids"][0].tolist()
    assert torch.equal(media["pixel_values_videos"], theirs["pixel_values_videos"])


@pytest.mark.parametrize("mode", list(SAMPLERS))
def test_both_samplings_are_one(mode, processor):
    processor.sampling, processor.max_clips = mode, 20
    random = np.random.default_rng(0)
    for duration_s, fps in zip(
        random.exponential(40, 300), random.uniform(0.2, 60, 300), strict=True
    ):
        for found, expected in zip(
            SAMPLERS[mode](duration_s, fps, processor),
            sample(duration_s, sampling_of(processor), fps),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
    assert sampling_of(processor) == ClipSampling(mode, 4, 2.0, 20)


def test_a_path_is_loaded_by_transformers(processor, plain_video):
    """SGLang hands over addresses. The colours are another converter's, so nearly ours."""
    text = processor.apply_chat_template(VIDEO_TURN, add_generation_prompt=True)
    theirs = processor(text=text, videos=[str(plain_video.path)])
    ours = processor(
        [user(load_video(plain_video.path, processor), QUESTION)], add_generation_prompt=True
    )
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    beside = theirs["pixel_values_videos"].int() - pack(ours["pixel_values"]).int()
    assert beside.abs().max() <= 3


def test_the_micro_model_answers_an_engine_as_it_answers_us(micro, scene_path):
    engine = Engine(micro.model, micro.processor)
    for question in (QUESTION, "Describe the video."):
        expected = micro.ask(scene_path, question, max_new_tokens=24).text
        turn = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
        ]
        text = micro.processor.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        assert engine.answer(text, [decode(scene_path)]) == expected != ""
        # SGLang hands the address on, and what comes back to the model's own forward.
        batch = micro.processor(text=text, videos=[str(scene_path)], return_tensors="pt")
        with torch.inference_mode():
            ids = micro.model.generate(**batch, max_new_tokens=24, do_sample=False)[0]
        new = ids[batch["input_ids"].shape[1] :]
        assert micro.processor.tokenizer.decode(new, skip_special_tokens=True).strip() == expected


# ---- too few frames ------------------------------------------------------------------------------


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """What the processor says from now on, also if it has said it in an earlier test."""
    transformers_logging.warning_once.cache_clear()
    return lambda: [
        record.getMessage() for record in caplog.records if record.levelname == "WARNING"
    ]


def test_neighbours_are_taken_with_one_warning(processor, plain_video, warnings_of):
    """32 frames of 12 s are 0.39 s apart; times are the file's, whatever was asked for."""
    frames, metadata = decode(plain_video.path, num_frames=32)
    video = {"videos": [frames], "video_metadata": [metadata]}
    batch = [processor(text="<|video_token|>", **video) for _ in range(2)][0]
    assert len(warnings_of()) == 1 and "neighbours" in warnings_of()[0]
    assert "clip from 00:10-00:12:" in TOKENIZER.decode(batch["input_ids"][0])


def test_uniform_frames_of_a_long_video_keep_their_times(processor, plain_video, warnings_of):
    """vLLM's default, on a smaller scale: 10 frames of 12 s, so that four span 5 s and not 2."""
    frames, metadata = decode(plain_video.path, num_frames=10)
    video = {"videos": [frames], "video_metadata": [metadata]}
    cut = [processor.video_processor(*video.values())["clips"][0] for _ in range(2)][0]
    assert len(warnings_of()) == 1
    assert "too few" in warnings_of()[0] and '{"video": {"num_frames": -1}}' in warnings_of()[0]
    times_s = np.array(metadata["frames_indices"]) / 30
    np.testing.assert_allclose(cut.spans_s[:, 0], times_s[::4])
    np.testing.assert_allclose(cut.spans_s[:, 1], [*times_s[4::4], 12.0])
    expected = np.stack([processor.squares[0].square(frames[i]) for i in (*range(10), 9, 9)])
    np.testing.assert_array_equal(cut.frames.reshape(expected.shape), expected)
    text = TOKENIZER.decode(processor(text="<|video_token|>", **video)["input_ids"][0])
    assert [part[:11] for part in text.split("clip from ")[1:]] == [
        "00:00-00:05",
        "00:05-00:11",
        "00:11-00:12",
    ]
    processor.max_clips = 2
    assert len(processor.video_processor(*video.values())["clips"][0].spans_s) == 2


@pytest.mark.parametrize(
    ("frames", "metadata", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), None, "need video_metadata"),
        (
            np.zeros((4, 8, 8, 3), np.uint8),
            {"total_num_frames": 4, "fps": None},
            "length is unknown",
        ),
        (np.zeros((4, 8, 8, 3), np.uint8), {"total_num_frames": 0, "fps": 2}, "length is unknown"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"total_num_frames": 4, "fps": float("nan")}, "unknown"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"total_num_frames": 5, "fps": 2}, "4 frames .* 5 "),
        (np.zeros((4, 8, 8, 3), np.float32), {"total_num_frames": 4, "fps": 2}, "must be uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), {"total_num_frames": 4, "fps": 2}, "must be uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), {"total_num_frames": 4, "fps": 2}, "must be uint8"),
    ],
)
def test_frames_that_make_no_sense(processor, frames, metadata, message):
    metadata = None if metadata is None else [metadata]
    with pytest.raises(ValueError, match=message):
        processor(text="<|video_token|>", videos=[frames], video_metadata=metadata)


def test_other_samplings_and_counts_are_refused(processor):
    frames, metadata = np.zeros((4, 8, 8, 3), np.uint8), {"total_num_frames": 4, "fps": 2}
    with pytest.raises(ValueError, match="1 videos came with 2 video_metadata"):
        processor(text="<|video_token|>", videos=[frames], video_metadata=[metadata] * 2)
    with pytest.raises(ValueError, match="2 <.video_token.>, but 1 videos"):
        processor(text="<|video_token|>" * 2, videos=[frames], video_metadata=[metadata])
    with pytest.raises(ValueError, match="go with text whose videos are frames"):
        processor([user(make_video(1))], video_metadata=[metadata])
    with pytest.raises(ValueError, match="truncation=False"):
        processor(text="a", truncation=True)
    processor.sampling = "uniform"
    with pytest.raises(ValueError, match="fps, released, not 'uniform'"):
        processor(text="<|video_token|>", videos=[frames], video_metadata=[metadata])


# ---- what is asked of the processor --------------------------------------------------------------


def test_what_vllm_looks_for(processor):
    from transformers.processing_utils import MultiModalData

    image_half, video_half = processor.image_processor, processor.video_processor
    assert video_half.do_sample_frames and video_half.temporal_patch_size == 4
    assert video_half.fps == 2.0 and set(video_half.size) == {"height", "width"}
    assert TOKENIZER.convert_tokens_to_ids(processor.video_token) == processor.video_token_id
    assert TOKENIZER.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    frames, metadata = np.zeros((30, 8, 8, 3), np.uint8), {"total_num_frames": 30, "fps": 10}
    batch = processor(
        text="<|image_token|><|video_token|>",
        images=[make_image()],
        videos=[frames],
        video_metadata=[metadata],
    )
    claimed = {*image_half.model_input_names, *video_half.model_input_names}
    assert claimed == set(batch) - {"input_ids", "attention_mask"}
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert len(batch["pixel_values"]) == 1 and batch["video_grid_thw"].tolist() == [[2, 1, 1]]
    counts = processor._get_num_multimodal_tokens(image_sizes=[[8, 8]], video_sizes=[[16, 8, 8]])
    assert isinstance(counts, MultiModalData)
    assert counts["num_image_tokens"] == [16] and counts["num_image_patches"] == [1]
    assert counts["num_video_tokens"] == [64]


def test_memory_is_planned_with_what_dummy_frames_then_take(processor):
    """vLLM's dummy video: frames one by one at the video half's own rate."""
    for num_frames in (4, 8, 16, 1000):
        frames = np.zeros((num_frames, 8, 8, 3), np.uint8)
        metadata = {"total_num_frames": num_frames, "fps": processor.video_processor.fps}
        batch = processor(text="<|video_token|>", videos=[frames], video_metadata=[metadata])
        planned = processor._get_num_multimodal_tokens(video_sizes=[[num_frames, 8, 8]])
        found = int((batch["input_ids"] == processor.video_token_id).sum())
        assert planned["num_video_tokens"] == [found]


def test_text_alone_has_no_pixels(processor):
    assert set(processor(text="hi")) == {"input_ids", "attention_mask"}
    batch = processor(text="<|image_token|>", images=[make_image()], with_pixels=False)
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("token_integration", ["none", "start_end", "timestamps_start_end"])
def test_the_commonest_token_of_a_replacement_is_the_placeholder(token_integration, micro):
    config = make_config(token_integration=token_integration, tokens_per_clip=16)
    processor = make_processor(config)
    frames = np.zeros((2000, 8, 8, 3), np.uint8)
    metadata = {"total_num_frames": 2000, "fps": 20.0}
    for one in (processor, micro.processor):
        one._get_num_multimodal_tokens(video_sizes=[[4, 8, 8]])
        _, is_feature, media = Engine(None, one).prompt(
            "<|video_token|>", videos=[(frames, metadata)]
        )
        assert is_feature.sum() == media["video_grid_thw"].prod() * one.tokens_per_clip


def test_too_few_tokens_per_clip_are_refused_at_the_start():
    processor = make_processor(make_config(tokens_per_clip=2))
    with pytest.raises(ValueError, match="tokens_per_clip 2 is too few for vLLM"):
        processor._get_num_multimodal_tokens(video_sizes=[[4, 8, 8]])


def test_loading_with_an_engines_options(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert not {"image_processor", "video_processor", "image_token", "video_token_id"} & set(saved)
    loaded = AutoProcessor.from_pretrained(
        tmp_path,
        tokenizer=TOKENIZER,
        do_sample_frames=True,
        trust_remote_code=False,
        revision="main",
    )
    assert loaded.tokens_per_clip == processor.tokens_per_clip


@pytest.mark.parametrize("template", CHAT_TEMPLATES.values(), ids=CHAT_TEMPLATES)
def test_templates_loop_over_the_parts_of_a_message(template):
    """By such a loop SGLang and vLLM see that media are parts, not words, of a message."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert any(isinstance(it, jinja2.nodes.Getattr) and it.attr == "content" for it in loops)


# ---- what is asked of the model ------------------------------------------------------------------


def test_rows_come_apart_again(processor):
    media = [("video", make_video(3)), ("image", make_image())]
    pixels = processor.pixels(media)
    sizes = [square.image_size for square in processor.squares]
    for part, again in zip(pixels, unpack(pack(pixels), sizes, 4), strict=True):
        assert torch.equal(part, again)
    picture = processor.image_processor([make_image()])["pixel_values"]
    for part, again in zip(pixels, unpack(picture, sizes, 4), strict=True):
        assert torch.equal(part[-1:], again)
    with pytest.raises(ValueError, match="use the model's own processor"):
        unpack(picture[:, :-1], sizes, 4)


@pytest.mark.parametrize("order", ["vii", "ivi", "iiv", "v", "ii"])
def test_pictures_and_videos_in_any_order(order, tmp_path, plain_video):
    config = make_config()
    model, processor = make_model(config), make_processor(config)
    frames, metadata = decode(plain_video.path)
    clips = load_video(plain_video.path, processor)
    images = [make_image(1), make_image(2)]
    waiting = list(images)
    ours = [clips if kind == "v" else waiting.pop(0) for kind in order]
    expected = processor([user(*ours, "what?")], add_generation_prompt=True)
    kinds = [{"type": {"v": "video", "i": "image"}[kind]} for kind in order]
    turn = [{"role": "user", "content": [*kinds, {"type": "text", "text": "what?"}]}]
    videos = {"videos": [frames], "video_metadata": [metadata]} if "v" in order else {}
    batch = processor(
        text=processor.apply_chat_template(turn, add_generation_prompt=True),
        images=images[: order.count("i")] or None,
        **videos,
    )
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, model(**expected).logits)
        new = [model.generate(**b, max_new_tokens=4, do_sample=False) for b in (batch, expected)]
        beams = [model.generate(**b, max_new_tokens=3, num_beams=2) for b in (batch, expected)]
    assert torch.equal(*new) and torch.equal(*beams)


def test_missing_rows_are_refused(processor):
    model = make_model(make_config(tokens_per_clip=16))
    batch = processor(text="<|image_token|><|image_token|>", images=[make_image(), make_image()])
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match="32 placeholders, the clips give 16 tokens"):
        model(**batch)


def test_attention_of_the_llm_and_of_nothing_else_goes_to_the_engine():
    calls = []

    def attend(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("engine", attend)
    config = make_config()
    config.text_config._attn_implementation = "engine"  # as vLLM and SGLang do it
    model = AutoModel.from_config(config).eval()
    assert type(model).is_backend_compatible()
    processor = make_processor(config)
    batch = processor(text="<|image_token|>what?", images=[make_image()])
    with torch.inference_mode():
        model.get_image_features(batch["pixel_values"])
        assert not calls
        model(**batch, use_cache=False, return_dict=False)
    assert calls == list(range(config.text_config.num_hidden_layers))


def test_the_llm_is_found():
    model = make_model(make_config())
    assert model.get_decoder() is model.model.llm is model.model.language_model
    assert type(model.model.get_encoder(modality="video")) is type(model.model)  # none by that name
    assert model.config.get_text_config() is model.config.text_config
    assert all(name.startswith("llm.") for name in model.model.tp_plan) and model.model.tp_plan


def test_plugins_make_the_engines_know_the_model(monkeypatch):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    known = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=known.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        module, function = points[group]["apollo"].split(":")
        for _ in range(2):  # engines call it in every process, some twice
            getattr(import_module(module), function)()
    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    assert known == {"ApolloForConditionalGeneration": backend}
