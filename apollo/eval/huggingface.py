"""Any image-text-to-text model of transformers as answerer, to compare with on equal terms.

Here because a score means little alone: the same questions, wording and scoring for everyone.
Frames lie evenly over the video. A processor that takes videos gets them as one video with its true
times, any other gets one image a frame. Each question is a prompt of its own: simple, right, and
slower than `local.py`. Tried with random weights of Idefics3 and LLaVA (frames as images) and of
Apollo's own model through the Auto classes. Processors of videos need torchvision: of those only
what they are called with is tested. Read next: `prompts.py`.
"""

import hashlib
import inspect
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apollo.chat import find_model
from apollo.data.features import fingerprint
from apollo.eval import prompts
from apollo.eval.answerers import Answer, choose
from apollo.eval.local import MAX_ANSWER_TOKENS, MAX_CAPTION_TOKENS, PRECISIONS
from apollo.eval.parsing import Parsed, parse_answer
from apollo.eval.questions import Question
from apollo.eval.watching import Watcher
from apollo.model import register
from apollo.runtime import pick_device
from apollo.video import ClipSampling, VideoClips


@dataclass(frozen=True)
class _Media:
    """What a processor is given: parts of a message that stand for media, and the media."""

    parts: list[dict[str, str]] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)


class HuggingFaceAnswerer:
    """Answers by the likelihood of letters, or by writing.

    Args:
        model: Folder or hub id of a model that `AutoModelForImageTextToText` loads.
        scoring: "letter" or "generate".
        batch_size: Not used: questions are asked one by one.
        num_frames: Frames of a video, evenly spread.
        dtype: One of `local.PRECISIONS`; by default float32 on a CPU and as saved elsewhere.

    Raises:
        ValueError: There is no such model, it cannot be loaded, or its letters are no tokens.
    """

    def __init__(
        self,
        model: str | Path,
        scoring: str = "letter",
        batch_size: int = 1,
        num_frames: int = 32,
        dtype: str | None = None,
    ) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; it must be at least 1")
        self.model, self.processor = _load(str(model), dtype)
        self.scoring = scoring
        self.watch = Watcher(ClipSampling("uniform", frames_per_clip=1, max_clips=num_frames))
        self.takes_videos = getattr(self.processor, "video_processor", None) is not None
        self.letter_ids = self._letter_ids() if scoring == "letter" else []
        self.identity: dict[str, Any] = {
            "kind": "huggingface",
            "weights": fingerprint(self.model),
            "prompt": prompts.prompt_hash(),
            "processor": self._processor_hash(),
            "sampling": {"mode": "uniform", "num_frames": num_frames},
            "scoring": scoring,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def answer(
        self, questions: Sequence[Question], condition: str, seen: VideoClips | None
    ) -> list[Answer]:
        """Answer one question after the other; see `answerers.Answerer`."""
        media = self._media(seen, condition)
        spans_s = prompts.shown_spans(seen)
        times_s = [] if seen is None else seen.times_s.round(3).tolist()
        return [
            self._answer(question, media, prompts.subtitles_text(question, spans_s), times_s)
            for question in questions
        ]

    def _answer(
        self, question: Question, media: _Media, before: str, times_s: list[list[float]]
    ) -> Answer:
        texts: list[str] = []
        num_read = num_written = 0
        if question.caption_prompt:
            inputs = self._inputs(media, before + question.caption_prompt)
            caption, num_written = self._write(inputs, MAX_CAPTION_TOKENS)
            num_read = inputs["input_ids"].shape[1]
            media, before, texts = _Media(), prompts.caption_text(caption), [caption]
        inputs = self._inputs(media, before + prompts.question_text(question, self.scoring))
        num_read += inputs["input_ids"].shape[1]
        if self.scoring == "letter":
            scores = self._score_letters(inputs, len(question.options))
            parsed = Parsed(choose(scores), "ok")
        else:
            text, num_tokens = self._write(inputs, MAX_ANSWER_TOKENS)
            parsed = parse_answer(text, question.options)
            texts, num_written = [*texts, text], num_written + num_tokens
            scores = []
        return Answer(
            prediction=parsed.prediction,
            status=parsed.status,
            option_scores=scores,
            text="\n".join(texts),
            frame_times_s=times_s,
            num_prompt_tokens=num_read,
            num_answer_tokens=num_written or None,
        )

    # ---- what the model is given -----------------------------------------------------------------

    def _media(self, seen: VideoClips | None, condition: str) -> _Media:
        """Hand over frames as the processor wants them."""
        if seen is None:
            return _Media()
        frames = seen.frames[:, 0]
        if condition == "frame" or not self.takes_videos:
            images = [Image.fromarray(frame) for frame in frames]
            return _Media([{"type": "image"}] * len(images), {"images": [images]})
        fps = seen.source_fps or 1.0
        metadata = {  # times as if in their own order, also of shuffled frames
            "total_num_frames": max(1, round(seen.duration_s * fps)),
            "fps": fps,
            "duration": seen.duration_s,
            "height": frames.shape[1],
            "width": frames.shape[2],
            "frames_indices": np.round(np.sort(seen.times_s[:, 0]) * fps).astype(int).tolist(),
        }
        inputs = {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
        return _Media([{"type": "video"}], inputs)

    def _inputs(self, media: _Media, text: str) -> Any:
        content = [*media.parts, {"type": "text", "text": text}]
        prompt = self._render(content)
        options: dict[str, Any] = {"return_tensors": "pt"}
        start = self.processor.tokenizer.bos_token
        if start and prompt.startswith(start):  # or the tokenizer would write it a second time
            options["add_special_tokens"] = False
        inputs = self.processor(text=[prompt], **media.inputs, **options)
        return inputs.to(self.model.device)

    def _render(self, content: list[dict[str, str]]) -> str:
        """Write the prompt up to where the assistant's turn begins."""
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    # ---- what the model does ---------------------------------------------------------------------

    @torch.inference_mode()
    def _score_letters(self, inputs: Any, num_options: int) -> list[float]:
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        output = self.model(**inputs, **({"logits_to_keep": 1} if keeps else {}))
        log_shares = output.logits[0, -1].float().log_softmax(-1)
        scores: list[Tensor] = [log_shares[ids].logsumexp(0) for ids in self.letter_ids]
        return [round(float(score), 4) for score in scores[:num_options]]

    @torch.inference_mode()
    def _write(self, inputs: Any, max_new_tokens: int) -> tuple[str, int]:
        """Write greedily; return the text and how many tokens it took."""
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)

    # ---- checks ----------------------------------------------------------------------------------

    def _letter_ids(self) -> list[list[int]]:
        """Find for each letter the tokens that may begin the assistant's turn with it.

        Many templates end in "Assistant:", after which a model writes a space and the letter as one
        token; both that and the bare letter count.
        """
        tokenizer = self.processor.tokenizer
        prompt = self._render([{"type": "text", "text": "?"}])
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found: list[list[int]] = []
        for letter in string.ascii_uppercase:
            texts = [prompt + letter, f"{prompt} {letter}"]
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            one_more = {row[-1] for row in rows if row[:-1] == before}
            if not one_more:
                raise ValueError(
                    f"the letter {letter} is no single token after this model's prompt; "
                    "use --scoring generate"
                )
            found.append(sorted(one_more))
        return found

    def _processor_hash(self) -> str:
        """SHA-256 of how prompts and pictures are prepared."""
        image_processor = getattr(self.processor, "image_processor", None)
        parts = [
            str(type(self.processor).__name__),
            self._render([{"type": "text", "text": "?"}]),
            image_processor.to_json_string() if image_processor else "",
        ]
        return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()


def _load(name: str, dtype: str | None) -> tuple[Any, Any]:
    """Load a model onto the fastest device, and its processor."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(f"dtype {dtype!r}: choose from {', '.join(PRECISIONS)}")
    register()
    path, device = find_model(name), pick_device()
    try:
        processor = AutoProcessor.from_pretrained(path)
        dtype = dtype or ("float32" if device.type == "cpu" else "auto")
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        if not getattr(processor, "chat_template", None):
            raise ValueError("its processor has no chat template")
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"cannot load the model {name!r}: {reason}") from error
    return model.to(device).eval(), processor
