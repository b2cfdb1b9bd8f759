"""What `torchrun` starts for tests/test_train_scale.py: the same runs, in each way of spreading."""

import sys
from pathlib import Path

import torch
from tiny_training import interrupted, train, train_apollo, weights, without_dropout

folder = Path(sys.argv[1])
for sharding in ("no", "fsdp2"):
    model = train_apollo(folder / sharding, sharding=sharding)
    if torch.distributed.get_rank() == 1:
        torch.save(weights(model), folder / f"{sharding}.pt")

# Resume with another number of processes, each way of spreading from the other's checkpoint.
model = without_dropout()
interrupted(folder / "from_two", at_batch=6, model=model, save_every=1, sharding="fsdp2")
for sharding in ("no", "fsdp2"):
    train(
        folder / f"from_one_{sharding}",
        model=without_dropout(),
        resume=True,
        sharding=sharding,
        gradient_checkpointing=True,
    )
torch.distributed.destroy_process_group()
