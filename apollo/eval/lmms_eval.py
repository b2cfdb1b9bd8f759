"""Apollo models inside lmms-eval: its tasks and its scores, with the model's own frame sampling.

Here because results that are compared with others' are run in the harness that made those. Once
both packages are installed the model is there by its entry point (group `lmms_eval.models`):

    lmms-eval --model apollo --model_args pretrained=DIR --tasks videomme --batch_size 1

lmms-eval knows two forms of a request. In the "chat" form, its default, a task gives messages
(`ApolloChat`); tasks that compare likelihoods exist in the older "simple" form only, reached by
--force_simple (`ApolloSimple`). Questions are asked one at a time, those about one video in
succession sharing its decoding and encoding. Written against lmms-eval 0.7.3; docs/evaluation.md
says what of it was run. For Apollo's own protocol see `runner.py`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from apollo.chat import VideoChat
from apollo.media import load_image, load_video
from apollo.messages import Message, map_media, media_parts, normalize
from apollo.runtime import progress
from apollo.video import SAMPLERS, VideoError

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100  # what the processor puts where nothing is supervised
MAX_NEW_TOKENS = 256  # where a task does not say
_GREEDY = {"do_sample": (None, False), "temperature": (None, 0, 0.0), "num_beams": (None, 1)}


def manifest() -> Any:
    """Tell lmms-eval which classes to load; its entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="apollo",
        chat_class_path=f"{__name__}.ApolloChat",
        simple_class_path=f"{__name__}.ApolloSimple",
    )


class ApolloSimple(lmms):
    """An Apollo model for requests of visuals and a text.

    Args:
        pretrained: Folder or hub id of the model, or "micro".
        sampling: How to sample videos, a key of `apollo.video.SAMPLERS`; by default as the model
            was trained.
        device: Where it runs; by default the fastest there is, with a GPU for each process.
        batch_size: 1; lmms-eval always gives it.
        max_batch_size: Not used; lmms-eval may give it.

    Raises:
        ValueError: There is no such model or sampling, or another batch size.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "micro",
        sampling: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size is {batch_size}; Apollo's questions are asked one by one")
        if sampling is not None and sampling not in SAMPLERS:
            raise ValueError(f"sampling {sampling!r}: choose from {', '.join(SAMPLERS)}")
        if device is None and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.chat = VideoChat.load(pretrained)
        if device is not None:
            self.chat.model.to(torch.device(device))  # type: ignore[arg-type]
        self.sampling = sampling
        self.num_unreadable = 0
        self._last: tuple[Any, Any] = (None, None)  # a video's path and its clips
        self._encoded: tuple[list[Any], Any] = ([], None)  # media and their features

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return self.chat.model.device

    # ---- what lmms-eval calls

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Write an answer to each request, always taking the likeliest token."""
        return [self._generate(*self._asked(request)) for request in self._shown(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Loss of each continuation as the assistant's turn, its end included.

        lmms-eval's interface speaks of log-probabilities, but its multiple-choice tasks take the
        option of the lowest number, and its models return the mean loss over the tokens: so does
        this.

        Returns:
            For each request the loss, and whether each token is the likeliest; wrapped, since the
            evaluator of 0.7.3 makes a text of a bare pair, at which every such task fails.
        """
        results = []
        for request in self._shown(requests):
            context, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(doc)
            messages = _one_turn(doc_to_visual(doc), context)
            pair: Any = self._loss(messages, str(continuation).strip())
            results.append(GenerationResult(pair))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: tasks of several rounds show a model its own answers by rules of their own."""
        raise NotImplementedError("Apollo answers tasks of one round")

    # ---- how it is done

    def _asked(self, request: Instance) -> tuple[list[Message], dict[str, Any]]:
        """Make messages and generation settings of a request."""
        context, settings, doc_to_visual, doc_id, task, split = request.args
        return _one_turn(doc_to_visual(self.task_dict[task][split][doc_id]), context), settings

    def _generate(self, messages: list[Message], settings: dict[str, Any]) -> str:
        for name, greedy in _GREEDY.items():
            if settings.get(name) not in greedy:
                logger.warning("%s=%s is ignored: Apollo decodes greedily", name, settings[name])
        try:
            messages = map_media(normalize(messages), self._load)
        except VideoError as error:
            self.num_unreadable += 1
            logger.error(
                "%s: its question gets an empty answer (%d so far)", error, self.num_unreadable
            )
            return ""
        text = self.chat.generate(messages, settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        return _cut(text, settings.get("until"))

    @torch.inference_mode()
    def _loss(self, messages: list[Message], continuation: str) -> tuple[float, bool]:
        messages = map_media(normalize(messages), self._load)
        answered = [*messages, {"role": "assistant", "content": continuation}]
        batch = dict(self.chat.processor([answered], with_labels=True))
        media = [source for _, source in media_parts(messages)]
        pixels = batch.pop("pixel_values")
        if media and list(map(id, media)) != list(map(id, self._encoded[0])):
            features = self.chat.model.encode([p.to(self.device) for p in pixels])
            self._encoded = (media, features)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch.pop("labels")[0, 1:]  # (L - 1,): each is predicted by the token before it
        logits = self.chat.model(
            **batch, clip_features=self._encoded[1] if media else None
        ).logits  # (1, L, vocabulary)
        asked = labels != IGNORED_LABEL
        log_shares = logits[0, :-1][asked].float().log_softmax(-1)  # (tokens, vocabulary)
        loss = -log_shares.gather(1, labels[asked, None]).mean()
        return float(loss), bool((log_shares.argmax(-1) == labels[asked]).all())

    def _load(self, kind: str, source: Any) -> Any:
        """Load a medium; the last video is kept, since its next question often follows."""
        if not isinstance(source, (str, Path)):
            return source
        if kind == "image":
            return load_image(source)
        if self._last[0] != source:
            self._last = (source, load_video(source, self.chat.processor, self.sampling))
        return self._last[1]

    def _shown(self, requests: Sequence[Instance]) -> Iterable[Instance]:
        return requests if self.rank else progress(requests, "requests")


class ApolloChat(ApolloSimple):
    """An Apollo model for requests that are messages."""

    is_simple = False

    def _asked(self, request: Instance) -> tuple[list[Message], dict[str, Any]]:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        to_messages: Callable[[Any], list[Message]] = doc_to_messages
        messages = to_messages(self.task_dict[task][split][doc_id])
        for part in (part for message in messages for part in message["content"]):
            if isinstance(part, dict) and (part.get("start_time") or part.get("end_time")):
                raise ValueError(f"task {task}: Apollo shows whole videos, not parts: {part}")
        return messages, settings


def _one_turn(visuals: Sequence[Any] | None, text: str) -> list[Message]:
    """Put visuals (paths of videos, images) before a text, as lmms-eval itself does."""
    media = []
    for visual in visuals or []:
        kind = "video" if isinstance(visual, (str, Path)) else "image"
        media.append({"type": kind, kind: visual})
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """Cut a text off before the first of the given ends."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.partition(end)[0] if end else text
    return text.strip()
