"""Every ablation of the paper as a study, at two scales.

Here so that each table can be asked again by one command. At the micro scale parts and data are
those of `apollo part` and `apollo world make` (docs/studies.md says which), trainings are short and
start from LLMs that can read already; at the paper's scale they are its own parts on the open
stand-ins for its data (mixtures/). What the paper leaves open and was chosen here says so. Free of
torch. Read next: `spec.py`; docs/findings.md, what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from apollo.lab.bases import (
    DINOV2,
    FEWER_STEPS,
    INTERNVIDEO2,
    LADDER,
    LLMS,
    MAX_CLIPS,
    MICRO_RATES,
    NO_LANGUAGEBIND,
    PAPER_RATES,
    PAPER_SHARES,
    PAPER_SOURCES,
    SFT_SHARES,
    SIGLIP,
    STEPS,
    VIDEOMAE,
    VJEPA,
    Steps,
    base,
    claims,
    micro_sources,
    micro_stages,
    part,
    printed_scores,
    side,
)
from apollo.lab.spec import (
    Asking,
    Claim,
    Scale,
    Settings,
    Study,
    paper_scores,
    read_paper_table,
)
from apollo.train.schedules import SCHEDULES

# ---- sampling


def sampling(scale: Scale) -> Study:
    """Frames at a constant rate against frames evenly over the video, in training and test."""
    numbers = (8, 16, 32, 64)
    stages = (0, 1) if scale == "micro" else (0, 1, 2)
    uniform: dict[str, Settings] = {
        f"{number} frames": {
            "model.sampling": "uniform",
            **{f"stages.{stage}.max_clips": number // 4 for stage in stages},
        }
        for number in numbers
    }
    most = MAX_CLIPS if scale == "micro" else 200
    scores = paper_scores("table11_uniform_sampling")
    fps = {("2 fps",): paper_scores("table10_fps_tps_sweep")[14]}  # 16 tokens, as all ablations
    printed = {  # rows 1 to 4 are asked as trained, 5 to 8 at 2 fps
        metric: fps | {(name,): scores[row] for row, name in enumerate(uniform, start=first)}
        for metric, first in (("as trained", 1), ("2 fps", 5))
    }
    return Study(
        name="sampling",
        about=sampling.__doc__ or "",
        mirrors="Table 11",
        axes={"training": {"2 fps": {}, **uniform}},
        asking={
            "as trained": Asking(),
            "2 fps": Asking(sampling="fps", max_clips=most),
        },
        metric="as trained",
        paper=printed,
        claims=[
            *claims(
                "training",
                (
                    2,
                    "Training at a constant rate beats 8 to 64 uniform frames.",
                    "2 fps",
                    [*uniform],
                ),
            ),
            Claim(
                finding=2,
                says="Asking at a constant rate helps a model that was trained on uniform frames.",
                more=side("training", [*uniform], metric="2 fps"),
                less=side("training", [*uniform], metric="as trained"),
            ),
        ],
        **base(scale),
    )


def tokens(scale: Scale) -> Study:
    """Frames per second and tokens per frame; their product is tokens per second."""
    rates = (0.5, 1, 2, 4)
    per_frame = (1, 2, 4, 8) if scale == "micro" else (2, 4, 8, 16, 32, 64, 128)
    best = ("2", "4") if scale == "micro" else ("8", "16", "32")
    few = ("1",) if scale == "micro" else ("2", "4")
    many = ("8",) if scale == "micro" else ("64", "128")
    rows = read_paper_table("table10_fps_tps_sweep")
    printed = {
        (f"{float(row['fps']):g}", row["tokens_per_frame"]): float(row["overall"]) for row in rows
    }

    def mean(*numbers: int) -> float:
        found = [score for (_, number), score in printed.items() if int(number) in numbers]
        return sum(found) / len(found)

    return Study(
        name="tokens",
        about=tokens.__doc__ or "",
        mirrors="Table 10",
        axes={
            "fps": {f"{rate:g}": {"model.clip_duration_s": 4 / rate} for rate in rates},
            "tokens per frame": {f"{n}": {"model.tokens_per_clip": 4 * n} for n in per_frame},
        },
        paper={"video": printed} if scale == "paper" else {},
        claims=claims(
            "tokens per frame",
            (
                3,
                "A moderate number of tokens per frame beats few.",
                best,
                few,
                {"paper": mean(8, 16, 32) - mean(2, 4)},
            ),
            (
                3,
                "A moderate number of tokens per frame beats many.",
                best,
                many,
                {"paper": mean(8, 16, 32) - mean(64, 128)},
            ),
        ),
        gaps="Moderate is 8 to 32 tokens in the paper; 2 and 4 of at most 8 at the micro scale, "
        "whose frames have 64 patches.",
        **base(scale, FEWER_STEPS),
    )


# ---- parts


def encoders(scale: Scale) -> Study:
    """Encoders alone and in pairs: image or video, supervised by language or by themselves."""
    image = {"DINOv2": "dinov2", "SigLIP": "siglip"}
    video = {"VideoMAE": "videomae", "InternVideo2": "internvideo2"}
    if scale == "paper":
        image = {"DINOv2": DINOV2, "SigLIP": SIGLIP}
        video = {"VideoMAE": VIDEOMAE, "V-JEPA": VJEPA, "InternVideo2": INTERNVIDEO2}

    def settings(*names: str) -> Settings:
        ids = [(image | video)[name] for name in names]
        if scale == "micro":
            return {"model.encoders": [part(name) for name in ids]}
        frames = 16 if {"VideoMAE", "V-JEPA"} & {*names} else 4  # paper, Sec. 4.2
        return {
            "model.encoders": ids,
            "model.frames_per_clip": frames,
            "model.clip_duration_s": frames / 2,
            "model.tokens_per_clip": 16 * frames,  # 32 tokens per second (Table 9)
        }

    alone = {name: settings(name) for name in (*image, *video)}
    pairs = {f"{v} + {i}": settings(i, v) for v in video for i in image}
    both = alone | pairs
    scores = {
        row["encoders"]: float(row["overall"]) for row in read_paper_table("table09_encoders")
    }
    printed = {(name,): scores[f"{name} SO400M" if name == "SigLIP" else name] for name in both}
    return Study(
        name="encoders",
        about=encoders.__doc__ or "",
        mirrors="Table 9",
        axes={"encoders": both},
        paper={"video": printed},
        claims=claims(
            "encoders",
            (4, "SigLIP, taught by language, beats DINOv2, which is not.", "SigLIP", "DINOv2"),
            (4, "SigLIP alone beats InternVideo2 alone.", "SigLIP", "InternVideo2"),
            (5, "InternVideo2 beside SigLIP beats SigLIP.", "InternVideo2 + SigLIP", "SigLIP"),
            (
                5,
                "Beside SigLIP, InternVideo2 beats VideoMAE.",
                "InternVideo2 + SigLIP",
                "VideoMAE + SigLIP",
            ),
        ),
        gaps=NO_LANGUAGEBIND + " V-JEPA 2 stands for V-JEPA at the paper's scale, and nothing does "
        "at the micro scale.",
        **base(scale),
    )


def resamplers(scale: Scale) -> Study:
    """What turns a clip's features into tokens: Perceiver, or MLP or convolution and pooling."""
    axis, names = "resampler", ("conv_pool", "mlp_pool", "perceiver")
    return Study(
        name="resamplers",
        about=resamplers.__doc__ or "",
        mirrors="Table 1",
        axes={axis: {name: {"model.connector.resampler": name} for name in names}},
        paper=printed_scores(
            "table01_resampling", {name: row for row, name in enumerate(names, start=1)}
        ),
        claims=claims(
            axis,
            (6, "The Perceiver beats two MLP layers and average pooling.", "perceiver", "mlp_pool"),
            (
                6,
                "The Perceiver beats two convolutions and average pooling.",
                "perceiver",
                "conv_pool",
            ),
        ),
        **base(scale),
    )


def integration(scale: Scale) -> Study:
    """What stands around the tokens of a clip: nothing, markers, times, or both."""
    axis = "integration"
    names = ("none", "start_end", "timestamps", "timestamps_start_end")
    return Study(
        name="integration",
        about=integration.__doc__ or "",
        mirrors="Table 2",
        axes={axis: {name: {"model.token_integration": name} for name in names}},
        paper=printed_scores(
            "table02_token_integration", {n: row for row, n in enumerate(names, start=1)}
        ),
        claims=claims(
            axis,
            (7, "Something between the clips beats nothing.", names[1:], "none"),
            (7, "Any tokens will do: times or markers.", "timestamps", "start_end", {"same": True}),
        ),
        **base(scale),
    )


def image_path(scale: Scale) -> Study:
    """Images as clips through both encoders (unified) against a path of their own (split)."""
    axis, names = "path", ("unified", "split")
    return Study(
        name="image-path",
        about=image_path.__doc__ or "",
        mirrors="Table 8",
        axes={axis: {name: {"model.connector.image_path": name} for name in names}},
        paper={"video": {("split",): 56.2, ("unified",): 56.8}},
        claims=claims(
            axis, (0, "Images as clips beat images on a path of their own.", "unified", "split")
        ),
        **base(scale),
    )


# ---- schedules


def _schedule(scale: Scale, row: int) -> Settings:
    """A schedule's stages; all schedules have equally many steps."""
    if scale == "paper":
        return {"recipe": f"schedule-{row}"}
    return {"stages": micro_stages(SCHEDULES[row], steps=FEWER_STEPS)}


def schedules(scale: Scale) -> Study:
    """Which parts learn when, and how fast: the seventeen schedules of Table 12."""
    axis = "schedule"
    return Study(
        name="schedules",
        about=schedules.__doc__ or "",
        mirrors="Tables 3 and 12",
        axes={axis: {str(row): _schedule(scale, row) for row in SCHEDULES}},
        paper=printed_scores("table12_schedules_raw", {str(row): row for row in SCHEDULES}),
        claims=claims(
            axis,
            (8, "Three stages beat two (rows 13 and 7).", "13", "7"),
            (8, "Two stages beat one (rows 5 and 1).", "5", "1"),
            (9, "Encoders frozen in the last stage beat trained ones (13 and 16).", "13", "16"),
            (9, "In one stage, frozen encoders beat trained ones (rows 1 and 3).", "1", "3"),
        ),
        **base(scale),
    )


def encoder_data(scale: Scale) -> Study:
    """Encoders trained before the LLM: not at all, on videos only, or on the whole mixture."""
    axis = "encoders see"
    if scale == "paper":
        levels: dict[str, Settings] = {
            "nothing": {"recipe": "schedule-5"},
            "videos": {"recipe": "schedule-13"},
            "mixture": {"recipe": "schedule-13", "stages.1.sources": [{"path": "sft.yaml"}]},
        }
    else:
        stages = _schedule(scale, 13)["stages"]
        mixed = {**stages[1], "sources": micro_sources(SFT_SHARES)}
        levels = {
            "nothing": _schedule(scale, 5),
            "videos": {"stages": stages},
            "mixture": {"stages": [stages[0], mixed, stages[2]]},
        }
    return Study(
        name="encoder-data",
        about=encoder_data.__doc__ or "",
        mirrors="Sec. 5.2",
        axes={axis: levels},
        paper=printed_scores("table12_schedules_raw", {"nothing": 5, "videos": 13}),
        claims=claims(
            axis,
            (
                9,
                "Training encoders on videos helps (rows 13 and 5 of Table 12).",
                "videos",
                "nothing",
            ),
            (9, "Training them on videos beats training them on the mixture.", "videos", "mixture"),
        ),
        gaps="The paper has no number for encoders that see the mixture while the LLM is frozen.",
        **base(scale),
    )


# ---- data


def _composition(scale: Scale, row: Mapping[str, str], steps: Steps = STEPS) -> Settings:
    shares = {kind: float(row[f"{kind}_pct"]) for kind in SFT_SHARES}
    if scale == "micro":
        return {"stages": micro_stages(shares=shares, steps=steps)}
    sources = [
        {"path": path, "type": kind, "weight": shares[kind]}
        for kind, path in PAPER_SOURCES.items()
        if shares[kind]
    ]
    return {"stages.2.sources": sources}


def composition(scale: Scale) -> Study:
    """Shares of text, images, several images and videos in the last stage: thirteen mixtures."""
    axis, table = "mixture", "table13_data_composition"
    rows = {row["row"]: row for row in read_paper_table(table)}

    return Study(
        name="composition",
        about=composition.__doc__ or "",
        mirrors="Table 13",
        axes={axis: {name: _composition(scale, row) for name, row in rows.items()}},
        paper=printed_scores(table, {name: int(name) for name in rows}),
        claims=claims(
            axis,
            (10, "15 % text, more video than images beats no text (rows 2 and 13).", "2", "13"),
            (10, "It beats 93 % video (rows 2 and 8).", "2", "8"),
            (10, "It beats mostly images (rows 2 and 6).", "2", "6"),
            (10, "It beats equal shares (rows 2 and 1).", "2", "1"),
        ),
        **base(scale),
    )


def _data_size(scale: Scale, thousands: int) -> Settings:
    if scale == "micro":
        total, early = STEPS
        return {
            f"stages.{stage}.steps": round(thousands / 750 * steps)
            for stage, steps in enumerate((early, total - early))
        }
    total = sum(PAPER_SHARES.values())
    return {
        f"stages.{stage}.steps": round(1000 * thousands * share / total / 256)
        for stage, share in enumerate(PAPER_SHARES.values())
    }


def data_size(scale: Scale) -> Study:
    """Samples seen, each once, by LLMs of two sizes."""
    micro = {size: _llm(part(f"llm-{size}")) for size in LADDER[:2]}
    paper = {"1.5B": _llm(LLMS["1.5B"]), "4B": _llm(LLMS["4B"])}
    return Study(
        name="data-size",
        about=data_size.__doc__ or "",
        mirrors="Fig. 3, right",
        axes={
            "thousand samples": {f"{n}": _data_size(scale, n) for n in (75, 150, 300, 500, 750)},
            "llm": micro if scale == "micro" else paper,
        },
        claims=claims(
            "thousand samples",
            (
                1,
                "From 500 thousand samples on, more make no difference (4B, Fig. 3).",
                "750",
                "500",
                {"same": True},
            ),
        ),
        gaps="The paper plots R2 to a 7B model and prints no scores. Samples of the micro scale "
        "are steps in the same proportions, 750 being all of them.",
        **base(scale),
    )


# ---- scaling


def _llm(path: str) -> Settings:
    return {"model.llm": path}


MIXTURES = {"A": "13", "B": "1", "C": "2"}
"""Data mixtures of the scaling study -> row of Table 13; the paper does not say what its were."""


def scaling(scale: Scale) -> Study:
    """Scaling Consistency: 7 designs x 3 data mixtures, each with four LLMs."""
    rows = {row["row"]: row for row in read_paper_table("table13_data_composition")}
    mixtures = {name: _composition(scale, rows[row], FEWER_STEPS) for name, row in MIXTURES.items()}
    sizes = {f"llm-{size}": _llm(part(f"llm-{size}")) for size in LADDER}
    if scale == "paper":
        sizes = {f"Qwen-{size}": _llm(name) for size, name in LLMS.items()}
    # The smallest stands beside the paper's smallest, and so on up.
    order = dict(zip(("0.5", "1.5", "4", "7"), sizes, strict=True))
    printed = {
        (row["data_mixture"], row["config"], order[row["llm_params_b"]]): float(
            row["average_score"]
        )
        for row in read_paper_table("scaling_consistency")
    }
    return Study(
        name="scaling",
        about=scaling.__doc__ or "",
        mirrors="Tables 14 and 15, Fig. 3",
        axes={"data": mixtures, "design": _designs(scale), "llm": sizes},
        paper={"video": printed},
        seeds=(0,),
        size_axis="llm",
        gaps=NO_LANGUAGEBIND
        + " InternVideo2 stands for it, V-JEPA 2 (micro: VideoMAE) for V-JEPA. "
        "What the paper's mixtures A, B and C are is not printed: rows 13, 1 and 2 of Table 13 are "
        "taken. Which of each pair of designs froze its encoders is not, either: b and f here.",
        **base(scale, FEWER_STEPS),
    )


def _designs(scale: Scale) -> dict[str, Settings]:
    """The seven of Table 14: encoder, seconds and tokens of a clip, encoders frozen or not."""

    def settings(video: str, seconds: float, tokens: int, trained: bool = False) -> Settings:
        stage = 1 if scale == "micro" else 2
        rate = (MICRO_RATES if scale == "micro" else PAPER_RATES)[0] * trained
        frames = 16 if video == VJEPA else 4
        image = part("siglip") if scale == "micro" else SIGLIP
        return {
            "model.encoders": [image, video],
            "model.clip_duration_s": seconds,
            "model.frames_per_clip": frames,
            "model.tokens_per_clip": tokens,
            f"stages.{stage}.learning_rates.encoders": rate,
        }

    if scale == "micro":
        first, second = part("internvideo2"), part("videomae")
        few, many, short, long = 4, 12, 2.0, 4.0
        return {
            "a": settings(first, short, few),
            "b": settings(first, short, many),
            "c": settings(first, short, many, trained=True),
            "d": settings(second, short, few),
            "e": settings(second, long, many),
            "f": settings(second, short, many),
            "g": settings(second, short, many, trained=True),
        }
    return {  # clips of InternVideo2 have 4 frames, half of LanguageBind's 8: half the seconds
        "a": settings(INTERNVIDEO2, 2.5, 16),
        "b": settings(INTERNVIDEO2, 2.5, 32),
        "c": settings(INTERNVIDEO2, 2.5, 32, trained=True),
        "d": settings(VJEPA, 5, 32),
        "e": settings(VJEPA, 10, 64),
        "f": settings(VJEPA, 5, 64),
        "g": settings(VJEPA, 5, 64, trained=True),
    }


STUDIES: dict[str, Callable[[Scale], Study]] = {
    "scaling": scaling,
    "sampling": sampling,
    "tokens": tokens,
    "encoders": encoders,
    "resamplers": resamplers,
    "integration": integration,
    "image-path": image_path,
    "schedules": schedules,
    "encoder-data": encoder_data,
    "composition": composition,
    "data-size": data_size,
}
"""Name on the command line -> study at a scale."""
SCALES: Sequence[Scale] = ("micro", "paper")
