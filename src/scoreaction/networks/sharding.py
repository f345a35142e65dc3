"""Sharded networks (FSDP2): each process holds a part of every tensor, and has the whole of one block while the block works.

torch's own `fully_shard`: accelerate's plugin makes the same call, but only for a model and an optimiser that are prepared
together, once a process, and it keeps the outermost parameters whole after a call. Those would be the old ones when weights
change between two calls without a graph, as averaged weights do.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scoreaction.world import World

if TYPE_CHECKING:
    from scoreaction.networks.model import Model

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks(net: nn.Module) -> list[nn.Module]:
    """The modules of which each is gathered by itself, inner ones first: those that the network names, else items of its lists.

    diffusers and transformers name them (`_no_split_modules`); else they are the items of the outermost lists.

    >>> [type(block).__name__ for block in blocks(nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2)))]
    ['Linear', 'Linear']
    """
    known: list[Any] = [module for module in net.modules() if hasattr(module, "_no_split_modules")]
    named = {name for module in known for name in module._no_split_modules or ()}
    chosen = [module for module in net.modules() if type(module).__name__ in named] if named else list(_items(net))
    return [module for module in reversed(chosen) if module is not net and any(True for _ in module.parameters())]


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, LISTS) and not isinstance(child, LISTS):
            yield child
        else:
            yield from _items(child)


def mesh_of(world: World, kind: str) -> DeviceMesh:
    """The processes by node: a network is cut among those of one node, and every node has all of it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if local < 2 or world.size % local:
        raise ValueError(
            f"train.shard: a network is cut among the processes of one node, and of {world.size} this one has {local};"
            " start as many on each node, at least 2, or set train.shard to false"
        )
    if local == world.size:
        return init_device_mesh(kind, (local,))
    return init_device_mesh(kind, (world.size // local, local), mesh_dim_names=("replicate", "shard"))


def shard(model: Model, world: World, device: torch.device) -> None:
    """Cuts a model's networks, in place, among the processes of a node, and moves the parts to their devices.

    Names stay. A LoRA, and what trains beside it, stays whole in every process: it is small. ValueError where a network cannot
    be cut.
    """
    mesh = mesh_of(world, device.type)
    for net in networks(model):
        # vectors of labels beside a LoRA too: an optimiser has parts of all of its weights or of none
        beside = model.lora is not None
        kept = {p for name, p in net.named_parameters() if ".lora_" in name or (beside and p.requires_grad)}
        widths = {str(p.dtype) for p in net.parameters() if p.requires_grad and p not in kept}
        if len(widths) > 1:
            raise ValueError(f"train.shard: trained weights must have one dtype, and have {', '.join(sorted(widths))}")
        for module in [*blocks(net), net]:
            try:
                # the outermost too: else it would keep old weights after a call without a graph
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
            except (ValueError, NotImplementedError, AssertionError) as error:
                raise ValueError(f"train.shard: {type(module).__name__} cannot be cut ({error}); set it to false") from error
    model.parameters, model.sharded = _of_names(model.net, model.parameters), True
    if model.consistency_net is not None:
        model.consistency_parameters = _of_names(model.consistency_net, model.consistency_parameters)


def networks(model: Model) -> list[nn.Module]:
    """The networks of a model, each once."""
    return [*{id(net): net for net in (model.net, model.reference_net, model.consistency_net) if net is not None}.values()]


def _of_names(net: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    own = dict(net.named_parameters())
    return {name: own[name] for name in names}


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor; all processes must ask for that of a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distributed_as(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, held as `own` is: this process's part where that is sharded."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def on_host(tree: Any, *, keep: bool) -> Any:
    """A tree of dicts and lists, its sharded tensors whole on the host where `keep`, elsewhere empty: one at a time."""
    if isinstance(tree, Mapping):
        return {key: on_host(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [on_host(value, keep=keep) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    full = whole(tree.detach())
    return full.cpu() if keep else full.new_empty(0)


@contextmanager
def gathered(model: Model, *, keep: bool) -> Iterator[None]:
    """Context in which a sharded model is, where `keep`, as before: whole, on the host, its modules of their own classes.

    All processes must enter it. The model is then to be read: no call works in it.
    """
    if not model.sharded:
        yield
        return
    undo: list[Callable[[], None]] = [partial(setattr, model, "parameters", model.parameters)]
    modules = {module: None for net in networks(model) for module in net.modules()}
    try:
        for module in modules:
            for name, p in module._parameters.items():
                full = on_host(p, keep=keep)
                if keep and p is not None:
                    undo.append(partial(module._parameters.__setitem__, name, p))
                    module._parameters[name] = nn.Parameter(full.detach().cpu(), requires_grad=p.requires_grad)
            if keep:
                undo.append(partial(_become, module, type(module), dict(vars(module))))
                _become(module, class_of(module), _plain(module))
        if keep:
            model.parameters = _of_names(model.net, model.parameters)
        yield
    finally:
        for step in undo:
            step()


def _become(module: nn.Module, kind: type, attributes: dict[str, Any]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)


def _plain(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without what `fully_shard` left: its state, its marks and its hooks."""
    own = {key: value for key, value in vars(module).items() if "fsdp" not in key and "composable_api" not in key}
    for key in ("_forward_hooks", "_forward_pre_hooks"):
        others = (
            (number, hook)
            for number, hook in own[key].items()
            if "fsdp" not in type(getattr(hook, "__self__", hook)).__module__
        )
        own[key] = OrderedDict(others)
    return own


def class_of(net: nn.Module) -> type:
    """The network's own class, which sharding derives another from."""
    return type(net).__bases__[1] if isinstance(net, FSDPModule) else type(net)
