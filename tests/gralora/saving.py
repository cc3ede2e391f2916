"""An adapter that says which it is, and what the processes do that save it until they are killed or hit a limit."""

import resource

import torch
from torch import nn

from flatlora import apply_gralora, save_gralora


def numbered(number, width=16):
    """An adapter whose alpha and whose every weight are `number`: a mixture of two shows."""
    model = apply_gralora(nn.Sequential(nn.Linear(width, width)), ["0"], r=4, k=2, alpha=number)
    with torch.no_grad():
        for parameter in (model[0].gralora_A, model[0].gralora_B):
            parameter.fill_(number)
    return model


def save_for_ever(folder, width, pipe):
    models = [numbered(number, width) for number in (2, 3)]
    while True:
        for model in models:
            save_gralora(model, folder)
            pipe.send("saved")


def save_under_a_limit(folder, width, limit, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_gralora(numbered(3, width), folder)
    except OSError as reason:
        pipe.send(str(reason))
