"""An Apollo model in VLMEvalKit, with the model's own frame sampling.

VLMEvalKit has no plugins. With both installed in one environment, in a clone of VLMEvalKit:

1. Copy this file to vlmeval/vlm/apollo.py.
2. Add to vlmeval/vlm/__init__.py:

       from .apollo import Apollo

3. Add to `supported_VLM` in vlmeval/config.py:

       "Apollo-micro": partial(Apollo, model_path="micro"),

4. Run: python run.py --model Apollo-micro --data Video-MME_64frame

The number of frames in a data set's name does not matter: the model gets the path of the video and
samples it as it was trained to (VLMEvalKit prints that it leaves its own number out).
"""

from typing import Any

from vlmeval.vlm.base import BaseModel

from apollo.chat import VideoChat
from apollo.media import load_image, load_video
from apollo.messages import map_media, normalize


class Apollo(BaseModel):
    """An Apollo model.

    Args:
        model_path: Folder or hub id of the model, or "micro".
        sampling: How to sample videos; see `apollo list samplings`.
        max_new_tokens: Most tokens of an answer.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True  # or it would get frames that VLMEvalKit has sampled
    allowed_types = ["text", "image", "video"]

    def __init__(
        self, model_path: str = "micro", sampling: str | None = None, max_new_tokens: int = 512
    ) -> None:
        self.chat = VideoChat.load(model_path)
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self._last: tuple[Any, Any] = (None, None)  # a video's path and its clips

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer a message of texts and of paths of images and videos."""
        parts = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        messages = map_media(normalize([{"role": "user", "content": parts}]), self._load)
        return self.chat.generate(messages, self.max_new_tokens)

    def _load(self, kind: str, source: Any) -> Any:
        """Load a medium; the last video is kept, since its next question often follows."""
        if kind == "image":
            return load_image(source)
        if self._last[0] != source:
            self._last = (source, load_video(source, self.chat.processor, self.sampling))
        return self._last[1]
