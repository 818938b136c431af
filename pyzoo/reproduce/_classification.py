"""What the claims about classifiers share: a training loop on images in memory, and the error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def train(model: nn.Module, images: Tensor, labels: Tensor, optimizer, schedule, steps: int, batch: int) -> list[float]:
    """The loss of each step."""
    losses = []
    while len(losses) < steps:
        for some in torch.randperm(len(images)).split(batch)[: steps - len(losses)]:
            loss = F.cross_entropy(model(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def error_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction that is told wrong."""
    return (model.eval()(images).argmax(1) != labels).float().mean().item()
