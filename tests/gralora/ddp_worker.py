"""What one process of the distributed test does; apart from the tests, so that a process imports little."""

import torch
from processes import leave_together
from torch import nn

from flatlora import apply_gralora


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    apply_gralora(model, "all-linear", r=8, k=4, hybrid_r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def run(rank, size, folder):
    """Two steps on a share of the batch; rank 0 saves what it trained."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store{size}", rank=rank, world_size=size)
    model = build()
    x, y = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        (wrapped(x.chunk(size)[rank]) - y.chunk(size)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save(trained, f"{folder}/{size}.pt")
    if size > 1:
        leave_together()
    torch.distributed.destroy_process_group()
