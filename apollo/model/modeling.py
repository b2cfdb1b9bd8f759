"""The model: encode each clip, connect it, scatter its tokens into the text, let the LLM go on.

`ApolloModel.forward` is the whole idea in a dozen lines. Everything Hugging Face expects of a model
works: Auto classes, `generate` with a cache, `save_pretrained`, gradient checkpointing. Read next:
`encoders.py` and `connector.py` for the two halves of seeing, `processing.py` for the text around
the placeholders.

Shapes: B rows of text, L their length, C clips in the whole batch, T frames, (T, H, W) grid of the
fused features, V their width, N tokens per clip, D width of the LLM.
"""

from collections.abc import Iterable
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel

from . import encoders as encoder_functions
from .configuration import ApolloConfig
from .connector import Connector, SplitConnector, init_connector_weights
from .processing import END_OF_TURN, IMAGE_TOKEN, VIDEO_TOKEN, new_special_tokens
from .segments import Segments
from .video_processing import unpack

IGNORED_LABEL = -100
(CACHE,) = {"past_key_values", "cache"} & {f.name for f in fields(BaseModelOutputWithPast)}
"""What transformers calls the cache of earlier tokens: `cache` from 5.24 on."""


class ApolloPreTrainedModel(PreTrainedModel):
    """What the two models share: their configuration and how new weights begin."""

    config: ApolloConfig
    config_class = ApolloConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Encoders and LLM begin as transformers' models do; what comes here is of the connector,
        # or the head.
        if module is getattr(self, "lm_head", None):
            super()._init_weights(module)
        else:
            init_connector_weights(module)


class ApolloModel(ApolloPreTrainedModel):
    """Encoders, connector and the LLM without its head."""

    def __init__(self, config: ApolloConfig) -> None:
        super().__init__(config)
        for encoder in config.encoders:
            encoder._attn_implementation = config._attn_implementation
        self.grid = encoder_functions.fused_grid(config.encoders, config.frames_per_clip)
        self.encoders = nn.ModuleList(
            encoder_functions.build(encoder, layer, config.frames_per_clip)
            for encoder, layer in zip(config.encoders, config.selected_layers, strict=True)
        )
        settings = config.connector_settings
        first = config.encoders[0].model_type
        if settings.image_path == "split" and not encoder_functions.ENCODERS[first].per_frame:
            raise ValueError(f"image_path split: the first encoder sees the images; {first} cannot")
        widths = [encoder.hidden_size for encoder in config.encoders]
        shape = (config.text_config.hidden_size, config.tokens_per_clip, self.grid)
        self.connector = (
            SplitConnector(settings, widths, *shape)
            if settings.image_path == "split"
            else Connector(settings, sum(widths), *shape)
        )
        self.llm = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.llm.set_input_embeddings(value)

    @property
    def language_model(self) -> PreTrainedModel:
        """The LLM under the name by which engines and transformers' `get_decoder` find it."""
        return self.llm

    def get_image_features(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """Encode and connect pictures for an engine, which puts the tokens into the text itself.

        Args:
            pixel_values: A row for each picture, see `video_processing.pack`.
            return_dict: Always true; engines say so.

        Returns:
            `pooler_output` (C, N, D), the tokens of each.
        """
        return self._clip_tokens(pixel_values, are_images=True)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Do the same for the clips of videos.

        Args:
            pixel_values_videos: A row for each clip of all videos.
            video_grid_thw: How many clips are whose; no clip looks at another, so that it does not
                matter.
            return_dict: Always true.
        """
        return self._clip_tokens(pixel_values_videos, are_images=False)

    def _clip_tokens(self, rows: torch.Tensor, are_images: bool) -> BaseModelOutputWithPooling:
        features = self.encode(self._unpack(rows.to(self.device)))
        is_image = torch.full((len(features),), are_images, device=features.device)
        return BaseModelOutputWithPooling(pooler_output=self.connect(features, is_image))

    def clips_of_engine(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Turn an engine's rows of pictures and clips into clips in the order of the text."""
        rows = [r.to(self.device) for r in (pixel_values, pixel_values_videos) if r is not None]
        pixels = [torch.cat(part) for part in zip(*map(self._unpack, rows), strict=True)]
        is_image = self._is_image(input_ids)
        order = torch.cat([is_image.nonzero(), (~is_image).nonzero()])[:, 0].argsort()
        if len(order) != len(pixels[0]):
            return pixels  # which `embed` refuses
        return [part[order] for part in pixels]

    def _unpack(self, rows: torch.Tensor) -> list[torch.Tensor]:
        sizes = [encoder_functions.image_size(encoder) for encoder in self.config.encoders]
        return unpack(rows, sizes, self.config.frames_per_clip)

    def encode(self, pixel_values: list[torch.Tensor]) -> torch.Tensor:
        """Run the encoders and fuse their features.

        Without gradients for the encoders, `config.encode_batch_size` clips are run at a time, so
        that a long video needs no more memory than a short one.

        Args:
            pixel_values: For each encoder the clips, (C, T, 3, S, S) with its own S: uint8 from the
                processor, or normalised.

        Returns:
            Fused features (C, T, H, W, V).

        Raises:
            ValueError: If there is not one tensor per encoder, or their clips differ in number or
                length.
        """
        self._check_pixels(pixel_values)
        num_clips = pixel_values[0].shape[0]
        trains = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.encoders.parameters()
        )
        size = max(num_clips, 1) if trains else self.config.encode_batch_size
        chunks = zip(*(pixels.split(size) for pixels in pixel_values), strict=True)
        return torch.cat([self._encode_chunk(chunk) for chunk in chunks])

    def _encode_chunk(self, pixel_values: Iterable[torch.Tensor]) -> torch.Tensor:
        features = [
            encoder_functions.encode(encoder, pixels)  # type: ignore[arg-type]
            for encoder, pixels in zip(self.encoders, pixel_values, strict=True)
        ]
        return encoder_functions.fuse(features, self.grid)

    def connect(self, features: torch.Tensor, is_image: torch.Tensor | None = None) -> torch.Tensor:
        """Turn fused features (C, T, H, W, V) into LLM tokens (C, N, D).

        Args:
            features: What `encode` made.
            is_image: Which of the clips are images (C,); by default none.
        """
        if is_image is None:
            is_image = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return self.connector(features.to(next(self.connector.parameters())), is_image)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: list[torch.Tensor] | torch.Tensor | None = None,
        clip_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model without its head.

        Args:
            input_ids: Token ids (B, L) with N placeholders for each clip.
            attention_mask: 1 for tokens, 0 for padding (B, L).
            pixel_values: For each encoder the clips of the batch in the order of their
                placeholders, (C, T, 3, S, S).
            clip_features: Instead of `pixel_values`: features that `encode` made earlier, (C, T, H,
                W, V).
            inputs_embeds: Embedded tokens (B, L, D) instead of `input_ids`, clips already in place.
            position_ids: Positions (B, L); 0 to L - 1 by default.
            use_cache: Whether to return a cache.
            segment_ids: For packed rows, which conversation of its row a token belongs to (B, L), 0
                for padding; see `segments.py`. They take the place of `attention_mask` and
                `position_ids`.
            pixel_values_videos: As engines move them: rows of clips, `pixel_values` then being rows
                of pictures (`clips_of_engine`).
            video_grid_thw: Of no effect, see `get_video_features`.
            kwargs: Handed to the LLM, the cache of earlier tokens among them.

        Returns:
            The LLM's output, `last_hidden_state` (B, L, D).

        Raises:
            ValueError: If the placeholders do not match the clips' tokens, or packed rows are to be
                gone on with.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give either input_ids or inputs_embeds")
            if isinstance(pixel_values, torch.Tensor) or pixel_values_videos is not None:
                assert not isinstance(pixel_values, list), "rows of videos go with rows of images"
                pixel_values = self.clips_of_engine(input_ids, pixel_values, pixel_values_videos)
            inputs_embeds = self.embed(input_ids, pixel_values, clip_features)
        if segment_ids is not None:
            if kwargs.pop(CACHE, None) is not None or use_cache:
                raise ValueError("packed rows are for training: segment_ids go with no cache")
            return Segments(segment_ids).run(self.llm, inputs_embeds, **kwargs)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: list[torch.Tensor] | None = None,
        clip_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the text (B, L), the clips' tokens in place of their placeholders: (B, L, D)."""
        is_placeholder = self.placeholders(input_ids)
        # Placeholders have no embedding of their own: their ids may lie outside the vocabulary.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        pixel_values = pixel_values or self._no_clips()
        if clip_features is None and (len(pixel_values[0]) > 0 or self.training):
            clip_features = self.encode(pixel_values)
        num_placeholders, size = int(is_placeholder.sum()), self.config.tokens_per_clip
        num_tokens = 0 if clip_features is None else size * len(clip_features)
        if num_placeholders != num_tokens:
            raise ValueError(
                f"the text has {num_placeholders} placeholders, the clips give {num_tokens} "
                f"tokens ({size} per clip); use the model's own processor"
            )
        if clip_features is None:
            return embeds
        tokens = self.connect(clip_features, self._is_image(input_ids)).flatten(0, 1)  # (C * N, D)
        return embeds.masked_scatter(is_placeholder[..., None], tokens.to(embeds))

    def placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return where ids (B, L) are placeholders, as a mask (B, L)."""
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    def _is_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which clips are images (C,): the first token of each says what it is."""
        firsts = input_ids[self.placeholders(input_ids)][:: self.config.tokens_per_clip]
        return firsts == self.config.image_token_id

    def _no_clips(self) -> list[torch.Tensor]:
        """Return zero clips.

        Training runs them through encoders and connector when a batch is text alone, so that every
        parameter takes part in every step, on every rank of a distributed run.
        """
        sizes = [encoder_functions.image_size(encoder) for encoder in self.config.encoders]
        shape = (0, self.config.frames_per_clip, 3)
        return [torch.zeros(*shape, size, size, device=self.device) for size in sizes]

    def _check_pixels(self, pixel_values: list[torch.Tensor]) -> None:
        if len(pixel_values) != len(self.encoders):
            raise ValueError(
                f"pixel_values: one tensor per encoder is needed, got {len(pixel_values)} "
                f"for {len(self.encoders)} encoders"
            )
        for pixels, encoder in zip(pixel_values, self.config.encoders, strict=True):
            size = encoder_functions.image_size(encoder)
            expected = (pixel_values[0].shape[0], self.config.frames_per_clip, 3, size, size)
            if tuple(pixels.shape) != expected:
                raise ValueError(
                    f"pixel_values: {encoder.model_type} takes (clips, frames, 3, height, width) "
                    f"= {expected}, got {tuple(pixels.shape)}"
                )


class ApolloForConditionalGeneration(ApolloPreTrainedModel, GenerationMixin):
    """An Apollo model that answers: `ApolloModel` and the LLM's head.

    Call it with the batch that `ApolloProcessor` makes: `model(**batch).loss`,
    `model.generate(**batch)`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.llm.embed_tokens.weight"}

    def __init__(self, config: ApolloConfig) -> None:
        super().__init__(config)
        self.model = ApolloModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LLM's head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's head."""
        self.lm_head = value

    def parts(self) -> dict[str, nn.Module]:
        """Return the three parts that training freezes or trains; each parameter is in one."""
        return {
            "encoders": self.model.encoders,
            "connector": self.model.connector,
            "llm": nn.ModuleList([self.model.llm, self.lm_head]),
        }

    def encode(self, pixel_values: list[torch.Tensor]) -> torch.Tensor:
        """Run the encoders, see `ApolloModel.encode`."""
        return self.model.encode(pixel_values)

    def connect(self, features: torch.Tensor, is_image: torch.Tensor | None = None) -> torch.Tensor:
        """Run the connector, see `ApolloModel.connect`."""
        return self.model.connect(features, is_image)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: list[torch.Tensor] | torch.Tensor | None = None,
        clip_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next token everywhere.

        Args:
            input_ids: See `ApolloModel.forward`, as for the other inputs that are not named here.
            attention_mask: As there.
            pixel_values: As there.
            clip_features: As there.
            labels: Ids (B, L) to learn, -100 where there is nothing to learn.
            num_items_in_batch: Number of supervised tokens in the whole optimiser step. With it the
                loss is the sum over this batch divided by that number, so that accumulation and
                ranks add up to one mean; without it the loss is this batch's mean.
            inputs_embeds: As there.
            position_ids: As there.
            use_cache: As there.
            logits_to_keep: Compute logits for the last so many tokens only, or for these positions;
                0 for all.
            pixel_values_videos: As in `ApolloModel.forward`.
            video_grid_thw: As there.
            kwargs: Handed to the LLM.

        Returns:
            Loss, logits (B, L, vocabulary) and cache. Of packed rows with labels, logits (1, number
            of labels, vocabulary): those that the loss needs.
        """
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            clip_features=clip_features,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=use_cache,
            pixel_values_videos=pixel_values_videos,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss_inputs = {"labels": labels}
        if labels is not None and kwargs.get("segment_ids") is not None:
            # Packed rows are for training, so that nobody reads their other logits: most tokens are
            # prompt, and logits are the widest thing of all.
            is_learnt = labels[:, 1:] != IGNORED_LABEL
            hidden = hidden[:, :-1][is_learnt][None]
            loss_inputs = {"labels": None, "shift_labels": labels[:, 1:][is_learnt][None]}
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **loss_inputs,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand on the clips whose placeholders are still to be read, and no others.

        After the first step that is none; in a later turn that goes on from a cache, the clips of
        that turn. `pixel_values` are those of the whole text, as the processor makes them.
        """
        mixin: Any = super()
        cache = past_key_values if cache is None else cache  # `generate` wants its name to be here
        inputs = mixin.prepare_inputs_for_generation(input_ids, **{CACHE: cache}, **kwargs)
        if cache is None or cache.get_seq_length() == 0:
            return inputs
        clips = self._clips_of_rows(input_ids)
        unread = self._clips_of_rows(inputs["input_ids"])
        kept = [row[len(row) - len(rest) :] for row, rest in zip(clips, unread, strict=True)]
        return _take_clips(inputs, kept if any(map(len, kept)) else None)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat each row with all of its clips, for beam search and for several answers."""
        clips = {name: model_kwargs.pop(name) for name in CLIP_INPUTS if name in model_kwargs}
        rows = model_kwargs.pop("pixel_values_videos", None)
        pixels = clips.get("pixel_values")
        if input_ids is not None and (rows is not None or isinstance(pixels, torch.Tensor)):
            clips["pixel_values"] = self.model.clips_of_engine(input_ids, pixels, rows)
        if expand_size > 1 and input_ids is not None:
            rows = self._clips_of_rows(input_ids)
            clips = _take_clips(clips, [row for row in rows for _ in range(expand_size)])
        mixin: Any = super()
        input_ids, model_kwargs = mixin._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **clips}

    def _clips_of_rows(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return for each row of text (B, L) the numbers of its clips."""
        num_placeholders = self.model.placeholders(input_ids).sum(1)
        num_clips = (num_placeholders // self.config.tokens_per_clip).tolist()
        return list(torch.arange(sum(num_clips), device=input_ids.device).split(num_clips))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; a released checkpoint is converted first, see `converted`."""
        from .conversion import converted  # which builds on this module

        path = converted(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def from_parts(
        cls,
        encoders: list[str | PathLike | PreTrainedModel],
        llm: str | PathLike | PreTrainedModel,
        tokenizer: Any,
        connector: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "ApolloForConditionalGeneration":
        """Join pre-trained encoders and a pre-trained LLM by a new connector.

        Args:
            encoders: One or two encoders, image encoder first: models, or what their
                `from_pretrained` takes. They are cut at the selected layer in place.
            llm: A causal language model, or what its `from_pretrained` takes.
            tokenizer: The LLM's tokenizer. The placeholder tokens are added to it where they are
                missing, and the LLM's embeddings grow if it has no rows for them.
            connector: Settings of the connector, see `ConnectorSettings`.
            settings: Further fields of `ApolloConfig`, such as `tokens_per_clip`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If a part is of an unknown kind or a setting does not exist.
        """
        new_special_tokens(tokenizer)
        encoder_models = [
            e if isinstance(e, PreTrainedModel) else load_encoder(e) for e in encoders
        ]
        if not isinstance(llm, PreTrainedModel):
            llm = AutoModelForCausalLM.from_pretrained(llm)
        if len(tokenizer) > llm.config.vocab_size:
            llm.resize_token_embeddings(len(tokenizer))
        if unknown := sorted(set(settings) - set(ApolloConfig.__dataclass_fields__)):
            raise ValueError(f"from_parts: ApolloConfig has no setting {', '.join(unknown)}")
        config = ApolloConfig(
            encoders=[model.config for model in encoder_models],
            text_config=llm.config,
            connector=connector or {},
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            **settings,
        )
        with torch.device("meta"):
            model = cls(config)
        model.model.encoders = nn.ModuleList(
            encoder_functions.cut(encoder, layer, config.frames_per_clip)
            for encoder, layer in zip(encoder_models, config.selected_layers, strict=True)
        )
        model.model.llm = llm.base_model
        model.lm_head = llm.get_output_embeddings()
        model.model.connector.to_empty(device=llm.device).to(llm.dtype).apply(
            init_connector_weights
        )
        model.generation_config = llm.generation_config
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model.eval()


CLIP_INPUTS = ("pixel_values", "clip_features")


def _take_clips(inputs: dict[str, Any], rows: list[torch.Tensor] | None) -> dict[str, Any]:
    """Return the inputs with the clips of these rows only; with None, without any."""
    others = {name: value for name, value in inputs.items() if name not in CLIP_INPUTS}
    if rows is None:
        return others
    index = torch.cat(rows)
    for name in CLIP_INPUTS:
        value = inputs.get(name)
        if value is not None:
            is_list = isinstance(value, list)
            others[name] = [part[index] for part in value] if is_list else value[index]
    return others


def load_encoder(path: str | PathLike) -> PreTrainedModel:
    """Load an encoder from a directory or the Hub.

    Of a checkpoint with a text half, such as a whole SigLIP, the vision half is loaded.

    Raises:
        ValueError: If it is no encoder of a known kind.
    """
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    if config.model_type not in encoder_functions.ENCODERS:
        known = ", ".join(encoder_functions.ENCODERS)
        raise ValueError(f"{path}: unknown encoder {config.model_type!r}; choose from {known}")
    kind = encoder_functions.ENCODERS[config.model_type]
    return kind.model_class.from_pretrained(path, config=config)
