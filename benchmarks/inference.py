"""Time and memory of a full-size model with random weights: encode, prefill, decode.

    python benchmarks/inference.py --size 3B            # on a GPU, bfloat16
    python benchmarks/inference.py --size tiny          # anywhere: shows that it runs

Ours (scaled dot product attention, 25 clips at a time) against the straightforward way (eager
attention, clip by clip), in turns on the same weights, after a warm-up round; medians. Peak memory
is what torch allocated beyond the weights, and is measured on GPUs only. Writes
benchmarks/results/inference_<size>.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config

from apollo.model import ApolloConfig, encoders
from apollo.model.modeling import CACHE, ApolloForConditionalGeneration
from apollo.runtime import environment, pick_device, set_seed

RESULTS = Path(__file__).parent / "results"
# Width, MLP width, layers, heads, KV heads, tied, vocabulary of Qwen2.5 (its config.json).
SIZES = {
    "1.5B": (1536, 8960, 28, 12, 2, True, 151936),
    "3B": (2048, 11008, 36, 16, 2, True, 151936),
    "7B": (3584, 18944, 28, 28, 4, False, 152064),
    "tiny": (64, 128, 2, 4, 2, True, 151936),
}
TINY_ENCODERS = [
    {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    {
        "model_type": "internvideo2",
        "d_model": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": 56,
        "mlp_ratio": 4,
    },
]
WAYS = {"ours": ("sdpa", 25), "straightforward": ("eager", 1)}
"""Name -> attention, clips at a time."""


def build(size: str) -> ApolloForConditionalGeneration:
    """Make the model with random weights where it will run."""
    hidden, inner, layers, heads, kv_heads, tied, vocabulary = SIZES[size]
    text_config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
    )
    options: dict[str, Any] = {"encoders": TINY_ENCODERS} if size == "tiny" else {}
    config = ApolloConfig(text_config=text_config, **options)
    device = pick_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return ApolloForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(work: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """Run once; return the result, the seconds and, on a GPU, the peak memory it took."""
    has_gpu = device.type == "cuda"
    if has_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    result = work()
    if has_gpu:
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - started}
    if has_gpu:
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result, found


@torch.inference_mode()
def one_round(
    model: ApolloForConditionalGeneration, way: str, num_clips: int, num_new_tokens: int
) -> dict[str, dict[str, float]]:
    """Encode the clips, read the prompt, write the answer."""
    attention, at_once = WAYS[way]
    for part in (model.model.llm, model.model.encoders[0]):
        part.set_attn_implementation(attention)
    model.config.encode_batch_size = at_once
    config, device = model.config, model.device
    sizes = [encoders.image_size(encoder) for encoder in config.encoders]
    pixels = [
        torch.randint(0, 256, (num_clips, config.frames_per_clip, 3, s, s), dtype=torch.uint8)
        for s in sizes
    ]
    placeholders = torch.full((1, num_clips * config.tokens_per_clip), config.video_token_id)
    words = torch.randint(0, 1000, (1, 64))
    input_ids = torch.cat([placeholders, words], dim=1).to(device)

    found = {}
    features, found["encode"] = measure(
        lambda: model.encode([p.to(device) for p in pixels]), device
    )
    options = {"attention_mask": torch.ones_like(input_ids), "use_cache": True}
    output, found["prefill"] = measure(
        lambda: model(input_ids, clip_features=features, logits_to_keep=1, **options), device
    )

    def decode() -> None:
        token, cache = output.logits[:, -1:].argmax(-1), output[CACHE]
        for _ in range(num_new_tokens):
            step = model(token, use_cache=True, **{CACHE: cache})
            token = step.logits[:, -1:].argmax(-1)

    _, found["decode"] = measure(decode, device)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3B")
    parser.add_argument("--clips", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    set_seed(0)
    model = build(options.size)
    rounds: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way in WAYS:
            # InternVideo2 knows only scaled dot product attention: "math" is its eager form.
            plain = sdpa_kernel(SDPBackend.MATH) if way == "straightforward" else nullcontext()
            with plain:
                found = one_round(model, way, options.clips, options.new_tokens)
            if number:  # the first is a warm-up
                rounds[way].append(found)
            print(number, way, found, flush=True)
    result: dict[str, Any] = {
        "size": options.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype),
        "clips": options.clips,
        "new_tokens": options.new_tokens,
        "environment": environment(),
    }
    for way, runs in rounds.items():
        result[way] = {
            phase: {key: statistics.median(r[phase][key] for r in runs) for key in runs[0][phase]}
            for phase in runs[0]
        }
    result["speedup"] = {
        phase: round(values["seconds"] / result["ours"][phase]["seconds"], 2)
        for phase, values in result["straightforward"].items()
    }
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"inference_{options.size.lower()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
