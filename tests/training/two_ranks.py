"""One of two ranks: a step of half the rows each under DistributedDataParallel and under FSDP2, whose gradients go to a file for each engine.

Run twice by test_two_ranks.py: python tests/training/two_ranks.py FOLDER RANK PORT
"""

import faulthandler
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.training import loss
from emergency_kit.training.batches import collate
from emergency_kit.training.fused.step import FusedStep
from emergency_kit.training.ranks import join
from emergency_kit.training.sharding import whole
from tests.training.test_fused import FAMILIES, ROWS, adapt


def main(folder: str, rank: int, port: int, ranks: int = 2) -> None:
    """Every rank takes every second row; the loss is divided by all labels and scaled by ranks, since DDP takes the mean."""
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that waits for ever says where
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                   "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    join("cpu", 60)
    for engine in ("fused", "modules", "divided"):
        found = step(engine, rank, ranks)
        if rank == 0:
            torch.save(found, f"{folder}/{engine}.pt")
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(ranks)])
    os._exit(0)  # neither leaves before both are done, and without gloo's teardown: it was seen to wait for a rank that had left


def step(engine: str, rank: int, ranks: int) -> dict[str, Any]:
    """Loss and gradients of one step."""
    torch.manual_seed(7)
    model = adapt(FAMILIES["llama"]())
    loss.install(model.get_base_model(), FusedStep(model.get_base_model(), 2) if engine == "fused" else None)
    labels = torch.tensor(sum(int((row.labels[1:] != IGNORE).sum()) for row in ROWS))
    batch = collate([{"input_ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in ROWS[rank::ranks]], pad_id=0)
    if engine == "divided":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parallel, _ = Accelerator(cpu=True).prepare(model, torch.optim.SGD(trained))
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
    else:
        parallel = DistributedDataParallel(model)
    for _ in range(2):  # twice: the reducer rebuilds its buckets after the first
        model.zero_grad()
        value = parallel(**batch, num_items_in_batch=labels)["loss"] * ranks
        value.backward()
    total = value.detach() / ranks
    dist.all_reduce(total)
    return {"loss": float(total), "gradients": whole({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
