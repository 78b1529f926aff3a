"""Which of the states in a file is read: the networks inside one state dict, the one asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.state import Root
from freezekit.errors import SelectionError

__all__ = ["choose", "choose_network", "named", "networks", "norms_of", "others_note"]

#: what training code calls networks that need not be built alike
_ROLES = frozenset(("student", "teacher", "online", "target", "ema", "model_ema", "ema_model"))
_MAX_NETWORKS = 16
_SHOWN = 5


def norms_of(names: Collection[str]) -> list[str]:
    """Return the layers with running statistics.

    >>> norms_of({"bn.running_mean": 0, "bn.running_var": 0, "bn.weight": 0})
    ['bn']
    """
    means = [name.rpartition(".") for name in names if name.endswith("running_mean")]
    return [
        layer
        for layer, dot, last in means
        # "bn_running_mean" and ".running_mean" are no layer's, as in StateTable.norm_layers
        if last == "running_mean" and bool(layer) == bool(dot) and f"{layer}{dot}running_var" in names
    ]


def networks(shapes: Mapping[str, object]) -> list[str]:
    """Return the prefixes that split one state dict into several networks.

    Where the names of the layers with running statistics part for the first time, a part is a network if
    another one has layers of the same names and shapes, as a teacher has them, or if it is called as one.

    Args:
        shapes: by a tensor's name its shape.

    >>> networks({f"{who}.bn.running_{what}": (2,) for who in ("net", "shadow") for what in ("mean", "var")})
    ['net', 'shadow']
    """
    layers = [layer.split(".") for layer in norms_of(shapes)]
    if len(layers) < 2:
        return []
    first, last = min(layers), max(layers)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    if common is None:  # one of them is the beginning of the other
        return []
    groups: dict[str, list[object]] = {}
    for layer in layers:
        name = ".".join((*layer, "running_mean"))
        groups.setdefault(layer[common], []).append((".".join(layer[common + 1 :]), _key(shapes.get(name))))
    built = {part: frozenset(group) for part, group in groups.items()}
    twins = Counter(built.values())
    found = [
        part
        for part in groups
        # blocks are built alike too, and are numbered
        if part in _ROLES or (twins[built[part]] > 1 and not part[-1:].isdecimal())
    ]
    few = len(groups) > 1 and len(found) <= _MAX_NETWORKS
    return [".".join((*first[:common], part)) for part in found] if few else []


def _key(shape: object) -> tuple[object, ...]:
    sizes = shape if isinstance(shape, tuple | list) and len(shape) == 1 else ()
    return tuple(size for size in sizes if type(size) is int)


def choose(roots: Sequence[Root], wanted: str) -> Root:
    """Return the root that was asked for.

    Args:
        roots: those in the file.
        wanted: its path, or the last part of it.

    Raises:
        SelectionError: there is none of that name, or several.

    >>> choose([Root("state_dict:teacher", 4, 1), Root("state_dict", 8, 2)], "teacher").path
    'state_dict:teacher'
    """
    exact = [root for root in roots if root.path == wanted]
    found = exact or [root for root in roots if root.path.endswith((f".{wanted}", f":{wanted}"))]
    if len(found) == 1 or exact:
        return found[0]
    shown = [f"'{printable(root.path)}' ({_norms(root)})" for root in (found or roots)[:10]]
    listed = ", ".join(shown) + (f" and {len(found or roots) - 10} more" if len(found or roots) > 10 else "")
    if found:
        raise SelectionError(
            "several roots of the file end so",
            got=f"root '{printable(wanted)}'",
            remedy=f"give one of {listed}",
        )
    lasts = {root.path.replace(":", ".").rpartition(".")[2]: root.path for root in roots}
    close = get_close_matches(wanted[:200], [root.path for root in roots][:1000], 1, 0.5)
    close = close or [lasts[last] for last in get_close_matches(wanted[:200], list(lasts)[:1000], 1, 0.5)]
    meant = f"; did you mean '{printable(close[0])}'?" if close else ""
    raise SelectionError(
        "the file has no such root", got=f"'{printable(wanted)}'", remedy=f"give one of {listed}{meant}"
    )


def choose_network(
    shapes: Mapping[str, object], wanted: str | None
) -> tuple[dict[str, str], str, tuple[Root, ...]]:
    """Choose in a file that holds one flat state.

    Args:
        shapes: by a tensor's name its shape.
        wanted: the network to read, or all of it.

    Returns:
        The names of the tensors to read, and what they are called there; the root's path; all the roots.

    Raises:
        SelectionError: there is no such network.
    """
    prefixes = {"": "", **{named("", prefix): f"{prefix}." for prefix in networks(shapes)}}
    inside = {
        path: {name: name[len(start) :] for name in shapes if name.startswith(start)}
        for path, start in prefixes.items()
    }
    roots = tuple(Root(path, len(n), len(norms_of(set(n.values())))) for path, n in inside.items())
    path = "" if wanted is None else choose(roots, wanted).path
    return inside[path], path, roots


def others_note(roots: Sequence[Root], read: str) -> list[str]:
    """Say what else could be read, and how."""
    others = [root for root in roots if root.path != read]
    others.sort(key=lambda root: root.norms == 0)
    if not others:
        return []
    shown = ", ".join(
        f"{printable(root.path, 60) or 'all of it'} ({_norms(root)})" for root in others[:_SHOWN]
    )
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    which = f"'{printable(read)}'" if read else "all of it"
    return [f"also holds: {shown}{more}; read {which}, --root NAME reads another"]


def named(path: str, prefix: str) -> str:
    """Return the path of a network inside the state dict at another path."""
    return f"{path}:{prefix}"


def _norms(root: Root) -> str:
    return f"{root.norms or 'no'} BN layer{'' if root.norms == 1 else 's'}"
