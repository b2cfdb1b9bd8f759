"""Does `apollo diagnose` name the link that was broken on purpose?

    python benchmarks/diagnose.py [--model micro] [--data runs/held_out]

The model is measured as it is, and broken at one link at a time: encoders that are blind (their
patch embeddings are zero), a connector that hands over another clip's tokens, and an LLM of random
weights. Writes benchmarks/results/diagnose.json and prints the verdicts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from apollo.chat import load_model
from apollo.eval.diagnose import diagnose, eyes_of
from apollo.model import ApolloForConditionalGeneration
from apollo.runtime import environment

RESULT = Path(__file__).parent / "results" / "diagnose.json"


def intact(model: ApolloForConditionalGeneration) -> None:
    """Nothing is broken."""


def blind_encoders(model: ApolloForConditionalGeneration) -> None:
    """No pixel reaches the encoders' layers."""
    embeddings = [
        module
        for module in model.parts()["encoders"].modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    ]
    assert len(embeddings) == len(model.config.encoders)
    for embedding in embeddings:
        nn.init.zeros_(embedding.weight)


def shuffled_connector(model: ApolloForConditionalGeneration) -> None:
    """Clips that are connected together get each other's tokens, in random order."""
    connect = model.model.connect
    generator = torch.Generator().manual_seed(0)

    def shuffled(features: torch.Tensor, is_image: torch.Tensor | None = None) -> torch.Tensor:
        tokens = connect(features, is_image)
        return tokens[torch.randperm(len(tokens), generator=generator)]

    model.model.connect = shuffled  # type: ignore[method-assign]


def untrained_llm(model: ApolloForConditionalGeneration) -> None:
    """All weights of the LLM are drawn anew."""
    torch.manual_seed(0)
    for weights in model.parts()["llm"].parameters():
        nn.init.normal_(weights, std=model.config.text_config.initializer_range)


BREAKS: tuple[tuple[Callable[[ApolloForConditionalGeneration], None], str | None], ...] = (
    (intact, None),
    (blind_encoders, "encoders"),
    (shuffled_connector, "connector"),
    (untrained_llm, "words"),
)
"""How a model is broken -> the link that is to be named."""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--data", default="runs/held_out")
    args = parser.parse_args()
    found = {}
    for break_it, expected in BREAKS:
        model, processor = load_model(args.model)
        break_it(model)
        diagnosis = diagnose(eyes_of(model, processor), args.data, model, processor)
        overall = diagnosis.to_json()["overall"]
        found[break_it.__name__] = {"expected": expected, **overall}
        print(break_it.__name__, overall["broken"], overall["verdict"], sep=": ", flush=True)
    result = {"found": found, "date": time.strftime("%Y-%m-%d"), "environment": environment()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
