"""Gradients with and without activations that are kept, and how many are kept."""

from typing import Any

import torch
from torch import Tensor

from galdist.models.layers import BlockNetwork


def compare_checkpointed(network: BlockNetwork, *inputs: Any) -> None:
    """The gradients of a network are the same, and far fewer bytes are kept for them."""
    gradients, kept = [], []
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    for network.checkpoint_activations in (False, True):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        network.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(*inputs).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        kept.append(sum(sizes.values()))
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, other)
    assert kept[1] < 0.6 * kept[0]
