"""Loading of weights into third-party networks: which part of a file fits, and what is wrong if none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.errors import RAISED
from orchestrator.models._checkpoints import (
    Inert,
    Part,
    containers,
    describe_content,
    entries,
    listed,
    read,
    resolve,
    tensors_in,
)

TOP = (Part(),)
"""The whole file, whose names are those of the module."""

AVERAGED = ("ema", "shadow", "averaged", "swa")
"""Parts of the names of averaged weights, which are usually those to sample with; they are proposed first."""

ANCHORS = 3
"""Number of the module's names by which a prefix is looked for."""

PROPOSED = 3
"""Number of fitting parts that an error message lists."""


class Misfit(NamedTuple):
    """What keeps weights from fitting a module: names of each kind of problem."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def __str__(self) -> str:
        kinds = zip(("missing", "unexpected", "wrong shape"), self, strict=True)
        return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds if names)


def misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> Misfit:
    """Compare weights with those of a module. A tied weight may be saved under any one of its names."""
    state = module.state_dict(keep_vars=True)
    present = {id(state[name]) for name in tensors if name in state}
    return Misfit(
        [name for name, value in state.items() if name not in tensors and id(value) not in present],
        [name for name in tensors if name not in state],
        [
            f"{name} {tuple(tensor.shape)} instead of {tuple(state[name].shape)}"
            for name, tensor in tensors.items()
            if name in state and tensor.shape != state[name].shape
        ],
    )


def read_weights(
    module: nn.Module, path: Path, parts: Sequence[Part] = TOP, trust_pickle: bool = False
) -> dict[str, Tensor]:
    """Read the weights of a module from a file, by the module's names; tensors are mapped from the disk if possible.

    Args:
        module: The module; only its names and shapes are read.
        path: The file.
        parts: Parts of the file; what a later one holds replaces what earlier ones hold.
        trust_pickle: Whether code in the file may run.

    Raises:
        ValueError: The file cannot be read, a part is not in it, or its weights are missing, unexpected or of the wrong
            shape. The message lists the names, and the options with which a part of the file fits completely.
    """
    content = read(path, trust_pickle=trust_pickle)
    try:
        tensors = _joined(module, content, parts, path)
        problems = misfit(module, tensors)
        if not any(problems):
            return tensors
        reason = f"the weights of {path} do not fit {type(module).__name__}: {problems}"
    except ValueError as error:
        reason, problems = str(error), None
    raise ValueError(f"{reason}; {_remedy(module, content, path, problems)}")


def load_weights(module: nn.Module, path: Path, parts: Sequence[Part] = TOP, trust_pickle: bool = False) -> None:
    """Copy the weights in a file into a module, in the module's dtype; arguments and errors as :func:`read_weights`."""
    # Not strict: the file holds a tied weight under one name only.
    module.load_state_dict(read_weights(module, path, parts, trust_pickle), strict=False)


def build_loaded(
    build: Callable[[], nn.Module], path: Path, parts: Sequence[Part], device: str, trust_pickle: bool = False
) -> nn.Module:
    """Build a module with the weights of a file on a device.

    Memory is allocated on that device only, and once, if the file holds all tensors of the module. Otherwise, for
    example with tables that the constructor computes, the constructor runs on the CPU.

    Args:
        build: Builds the module.
        path, parts, trust_pickle: See :func:`read_weights`.
        device: Where the weights go. A module with a method ``to`` of its own is left on the CPU.
    """
    try:
        with torch.device("meta"):
            module = build()
    except RAISED:  # a constructor that computes with values; any other error is raised again below
        module = None
    if module is not None and _is_saved_completely(module):
        tensors = read_weights(module, path, parts, trust_pickle)
        _fill(module, tensors, device if type(module).to is nn.Module.to else "cpu")
        return module
    module = build()
    load_weights(module, path, parts, trust_pickle)
    return module


def _is_saved_completely(module: nn.Module) -> bool:
    """Whether all tensors of a module are in its state dictionary, and plain."""
    saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for part in module.modules():
        held = [*part._parameters.values(), *part._buffers.values()]
        if any(value is not None and (id(value) not in saved or not value.is_meta) for value in held):
            return False
        if any(type(value) not in (nn.Parameter, type(None)) for value in part._parameters.values()):
            return False
        own = [value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")]
        if any(isinstance(value, Tensor) for value in _flat(own)):
            return False
    return True


def _flat(values: Iterable[Any], depth: int = 3) -> Iterator[Any]:
    for value in values:
        yield value
        if depth and isinstance(value, list | tuple | dict | set):
            yield from _flat(value.values() if isinstance(value, dict) else value, depth - 1)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], device: str) -> None:
    """Replace the meta tensors of a module by copies of ``tensors``; what is tied stays tied."""
    state = module.state_dict(keep_vars=True)
    values = {id(state[name]): tensor for name, tensor in tensors.items()}
    filled: dict[int, Tensor] = {}

    def replaced(old: Tensor) -> Tensor:
        if id(old) not in filled:
            new = torch.empty_like(old, device=device, requires_grad=False)
            with torch.no_grad():
                new.copy_(values[id(old)])
            filled[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return filled[id(old)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is not None:
                    table[name] = replaced(old)  # type: ignore[assignment]


def read_module(path: Path, part: Part) -> nn.Module:
    """Read a whole pickled module, or a part of one; code in the file is run.

    Args:
        path: The file.
        part: Where the module is; the prefix names a module within it, as "module." does in one for parallel training.

    Raises:
        ValueError: The file cannot be read, or no module is there.
    """
    node = resolve(read(path, trust_pickle=True), part.key, path)
    if isinstance(node, nn.Module) and part.prefix:
        try:
            node = node.get_submodule(part.prefix.removesuffix("."))
        except AttributeError as error:
            raise ValueError(
                f"weights_prefix={part.prefix!r} names no part of {type(node).__name__}: {error}"
            ) from error
    if not isinstance(node, nn.Module):
        raise ValueError(
            f"{path} holds {describe_content(node)} instead of a module; set factory to what returns the module"
        )
    return node


# ---- parts of a file ----------------------------------------------------------------------------------------------


def _joined(module: nn.Module, content: Any, parts: Sequence[Part], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _selected(module, resolve(content, part.key, path), part, path)
    return tensors


def _selected(module: nn.Module, node: Any, part: Part, path: Path) -> dict[str, Tensor]:
    """The tensors of a part by the module's names.

    Raises:
        ValueError: The part does not hold tensors, or a list does not fit the module's parameters.
    """
    place = str(path) if part.key is None else f"{part.key!r} of {path}"
    if isinstance(tensors := tensors_in(node), list):
        if part.prefix:
            raise ValueError(f"weights_prefix={part.prefix!r} has no effect on {place}, a list without names")
        return _named(module, tensors, place)
    entries = node.state_dict() if isinstance(node, nn.Module) else node
    if not isinstance(entries, Mapping) or tensors is None:
        raise ValueError(f"{place} is not a state dictionary but {describe_content(node)}")
    chosen = {str(n)[len(part.prefix) :]: v for n, v in entries.items() if str(n).startswith(part.prefix)}
    if not chosen:
        raise ValueError(f"no name in {place} starts with {part.prefix!r}; it holds {listed(list(tensors))}")
    other = [f"{name} ({describe_content(value)})" for name, value in chosen.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{place} is not a state dictionary; beside tensors it holds {listed(other)}")
    return _with_dots(module, chosen)


def _named(module: nn.Module, tensors: list[Tensor], place: str) -> dict[str, Tensor]:
    """A list in the order of ``parameters()``, as averages of weights are kept, by name."""
    parameters = dict(module.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for names in (list(parameters), trained):  # some libraries average what is trained only
        if [parameters[name].shape for name in names] == [tensor.shape for tensor in tensors]:
            return dict(zip(names, tensors, strict=True))
    if len(tensors) not in (len(parameters), len(trained)):
        raise ValueError(
            f"{place} is a list of {len(tensors)} tensors, but {type(module).__name__} has {len(parameters)} parameters"
        )
    names = list(parameters) if len(tensors) == len(parameters) else trained
    name, tensor = next((n, t) for n, t in zip(names, tensors, strict=True) if parameters[n].shape != t.shape)
    raise ValueError(
        f"{place} is a list of tensors, but not in the order of {type(module).__name__}.parameters(): instead of "
        f"{name} {tuple(parameters[name].shape)} it holds {tuple(tensor.shape)}"
    )


def _with_dots(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restore the dots in names, which averages of weights of latent diffusion leave out."""
    if any("." in name for name in tensors):
        return tensors
    names = dict(module.named_parameters(remove_duplicate=False))
    dotted = {name.replace(".", ""): name for name in names}
    if len(dotted) < len(names) or not dotted.keys() & tensors.keys():
        return tensors
    return {dotted.get(name, name): tensor for name, tensor in tensors.items()}


# ---- proposals ----------------------------------------------------------------------------------------------------


def _remedy(module: nn.Module, content: Any, path: Path, problems: Misfit | None) -> str:
    fitting, nearest = _search(module, content, path)
    if fitting:
        first, *others = [_options(parts) for parts in fitting[:PROPOSED]]
        also = "".join(f"\nor, which fits as well:{other}" for other in others)
        return f"add beside weights{first}{also}"
    if nearest is not None and nearest[0] != TOP:
        return f"nothing in it fits completely; nearest comes{_options(nearest[0])}\nwith {nearest[1]}"
    if isinstance(content, Inert) or any(isinstance(value, Inert) for _, value in entries(content)):
        return (
            "whole pickled modules are loaded with trust_pickle: true, which runs code in the file, so set it only if "
            "you trust its source; or save the module's state_dict()"
        )
    if problems is None:
        return "save only the module's state_dict(), preferably as safetensors"
    return "set kwargs to the factory arguments used in training, or rename the weights to match the module"


def _options(parts: Sequence[Part]) -> str:
    """The options that name these parts, as lines of YAML."""
    keys, prefixes = [part.key for part in parts], [part.prefix for part in parts]
    named: dict[str, Sequence[str | None]] = {"weights_key": keys, "weights_prefix": prefixes}
    texts = {option: [_yaml(value) for value in values] for option, values in named.items() if any(values)}
    shown = {name: values[0] if len({*values}) == 1 else f"[{', '.join(values)}]" for name, values in texts.items()}
    return "".join(f"\n  {name}: {value}" for name, value in shown.items())


def _yaml(value: str | None) -> str:
    if value is None:
        return "null"
    return value if value and value.replace(".", "").replace("_", "").isalnum() and value[0].isalpha() else f'"{value}"'


def _search(
    module: nn.Module, content: Any, path: Path
) -> tuple[list[tuple[Part, ...]], tuple[tuple[Part, ...], Misfit] | None]:
    """Parts of a file that fit a module completely, averaged weights first, and the nearest part if none does."""
    state = module.state_dict(keep_vars=True)
    untrained = {name for name, value in state.items() if not value.requires_grad}
    complete: list[Part] = []
    partial: list[Part] = []
    near: list[tuple[int, Part, Misfit]] = []
    for part in _candidates(state, content):
        try:
            tensors = _selected(module, resolve(content, part.key, path), part, path)
        except ValueError:
            continue
        problems = misfit(module, tensors)
        if not any(problems):
            complete.append(part)
        elif untrained.issuperset(problems.missing) and not problems.unexpected and not problems.reshaped:
            partial.append(part)
        near.append((sum(map(len, problems)), part, problems))
    plain = [part for part in complete if not _is_averaged(part)] or complete
    fitting: list[tuple[Part, ...]] = [(part,) for part in complete]
    fitting += [(plain[0], part) for part in partial if plain]
    fitting.sort(key=lambda parts: (not _is_averaged(parts[-1]), len(str(parts))))
    closest = min(near, key=lambda item: item[0], default=None)
    return fitting, None if closest is None or closest[0] >= len(state) else ((closest[1],), closest[2])


def _candidates(state: Mapping[str, Tensor], content: Any) -> Iterator[Part]:
    trained = [name for name, value in state.items() if value.requires_grad] or list(state)
    anchors = sorted(trained, key=len, reverse=True)[:ANCHORS]
    anchors += [anchor.replace(".", "") for anchor in anchors]
    for key, node in containers(content):
        names = tensors_in(node) or []
        if isinstance(names, list):
            yield Part(key)
        else:
            fitting = [name[: -len(anchor)] for anchor in anchors for name in names if name.endswith(anchor)]
            yield from (Part(key, prefix) for prefix in dict.fromkeys(fitting))


def _is_averaged(part: Part) -> bool:
    return any(word in f"{part.key} {part.prefix}".lower() for word in AVERAGED)
