"""What `decoder_scaling` changes: pixels, features and time, against the exact preprocessing.

    python benchmarks/preprocessing.py VIDEO... [--encoder DIR]

For each video the frames of the default sampling (at most 8 clips) are prepared in both ways for a
SigLIP of 384 pixels and compared in levels of 255. Features are those of the shipped micro model's
image encoder (128 pixels) and of a Hugging Face image encoder in DIR (its configuration says what
kind): cosine similarity of each patch, and the distance in per cent of that between neighbouring
frames of a clip, half a second apart. Video encoders keep their exact filter. Writes
benchmarks/results/preprocessing.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from apollo.chat import load_model
from apollo.model import encoders
from apollo.model.image_processing import Preprocessing
from apollo.runtime import environment
from apollo.video import ClipSampling, load_clips

RESULT = Path(__file__).parent / "results" / "preprocessing.json"
SAMPLING = ClipSampling(max_clips=8)
SIGLIP = Preprocessing(384, encoders.HALF, encoders.HALF, "pillow_bicubic")


def both(path: str, exact: Preprocessing) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The squares (C, T, S, S, 3) of the exact and of the fast way, and the seconds of each."""
    results, seconds = [], []
    for way in (exact, exact.faster()):
        started = time.perf_counter()
        results.append(load_clips(path, SAMPLING, squares=[way], num_threads=1).squares[0])
        seconds.append(time.perf_counter() - started)
    return *results, *seconds


def compare_pixels(exact: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """Differences in levels."""
    difference = np.abs(exact.astype(int) - fast)
    return {
        "mean": round(float(difference.mean()), 3),
        "p99": float(np.percentile(difference, 99)),
        "max": int(difference.max()),
    }


def compare_features(exact: torch.Tensor, fast: torch.Tensor) -> dict[str, float]:
    """Features (C, t, h, w, D) of both ways."""
    apart = (exact - fast).norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(exact, fast, dim=-1)
    result = {
        "cosine_median": round(float(cosine.median()), 4),
        "cosine_p01": round(float(cosine.flatten().quantile(0.01)), 4),
    }
    if exact.shape[1] > 1:
        moved = (exact[:, 1:] - exact[:, :-1]).norm(dim=-1).mean()
        result["per_cent_of_a_frame_step"] = round(100 * float(apart.mean() / moved), 1)
    return result


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--encoder", metavar="DIR")
    args = parser.parse_args()

    model, processor = load_model()
    probes = {
        f"micro {encoder.config.model_type}": (square, encoder)
        for square, encoder in zip(processor.squares, model.model.encoders, strict=True)
        if square.faster() != square
    }
    if args.encoder:
        config = AutoConfig.from_pretrained(args.encoder)
        kind = encoders.ENCODERS[config.model_type]
        encoder = kind.model_class.from_pretrained(args.encoder).eval()
        probes[f"{config.model_type}, {config.num_hidden_layers} layers"] = (
            encoders.preprocessing(config),
            encoders.cut(encoder, -2, num_frames=4),
        )

    result = {"environment": environment(), "videos": {}}
    for path in args.videos:
        entry: dict[str, dict] = {}
        exact, fast, exact_s, fast_s = both(path, SIGLIP)
        entry["siglip 384"] = {
            "levels": compare_pixels(exact, fast),
            "time_ratio": round(exact_s / fast_s, 2),
        }
        for name, (square, encoder) in probes.items():
            exact, fast, _, _ = both(path, square)
            with torch.no_grad():
                features = [encoders.encode(encoder, square.normalise(x)) for x in (exact, fast)]
            entry[name] = {
                "levels": compare_pixels(exact, fast),
                "features": compare_features(*features),
            }
        result["videos"][Path(path).name] = entry
        print(Path(path).name, json.dumps(entry, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
