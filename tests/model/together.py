"""Trains a small model for 20 steps on all processes that torchrun started: OUT DTYPE OPTIMISER."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from small import batch, small_model  # noqa: E402

from model.config import OptimConfig  # noqa: E402
from model.distributed import start  # noqa: E402
from model.optim.optimiser import Optimizer  # noqa: E402
from model.optim.schedule import Rates  # noqa: E402

out, dtype, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
world = start(rank, rank, size, "cpu")
model = small_model(arch="modern", depth=4).to(getattr(torch, dtype))
model.compute_dtype = getattr(torch, dtype)
config = OptimConfig(name=name, orthogonal_dtype=dtype, normuon=True, scalar_lr=0.01, width_ref=None)
if name != "muon":
    config = OptimConfig(name=name, matrix_lr=1e-3, embedding_lr=1e-3, unembedding_lr=1e-3, scalar_lr=1e-3)
optimizer = Optimizer(model, config, 32, world)
for step in range(20):
    tokens, targets = (part[rank::size] for part in batch(rows=4, seed=step))
    model.loss(tokens, targets).backward()
    optimizer.step(Rates(1.0, 0.9, 1.0), 1 / (4 * 24), clip=1.0 if name == "muon" else None)
out.mkdir(parents=True, exist_ok=True)
(out / f"state-{rank}").write_text(str(sum(held.numel() for _, _, held in optimizer.pieces())))
if rank == 0:
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, out / "weights.safetensors")
world.close()
