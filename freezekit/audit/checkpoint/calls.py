"""What a call in a pickle becomes: a container, a tensor's description, something inert, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import GlobalRef, Key, Opaque, TensorRef
from freezekit.audit.checkpoint.rebuild import rebuild, usual_tensor, with_state
from freezekit.audit.checkpoint.verdicts import is_compiled, is_harmful, is_weapon
from freezekit.errors import CheckpointError

__all__ = ["as_tuple", "call", "check_adding", "check_state", "fill"]

_DICTS = {
    GlobalRef("collections", "OrderedDict"),
    GlobalRef("collections", "defaultdict"),
    GlobalRef("collections", "Counter"),
    GlobalRef("builtins", "dict"),
}
_SEQUENCES = {GlobalRef("builtins", name) for name in ("list", "tuple", "set", "frozenset")}
_NEW_OBJECT = {GlobalRef("copyreg", name) for name in ("_reconstructor", "__newobj__", "__newobj_ex__")}
#: what TorchScript wraps a list in, to tell its type; each returns its first argument
_TYPED_LISTS = {
    GlobalRef("torch.jit._pickle", name)
    for name in ("restore_type_tag", *(f"build_{kind}list" for kind in ("int", "tensor", "double", "bool")))
}
_MAX_LAYERS = 16
_GETATTR = GlobalRef("builtins", "getattr")
_OR = GlobalRef("operator", "or_")
#: attributes that unpickling itself looks up on an object and calls
_CALLED = ("__setstate__", "append", "extend", "add")
_FROM_TYPE = {
    GlobalRef(module, name)
    for module in ("torch._tensor", "torch.tensor", "torch._utils")
    for name in ("_rebuild_from_type", "_rebuild_from_type_v2")
}


#: what tensors are made of, tried first; ``None`` is for a call that is not of the usual kind
_QUICK: dict[GlobalRef, Callable[[tuple[Any, ...]], Any]] = {
    GlobalRef("collections", "OrderedDict"): lambda args: None if args else {},
    GlobalRef("torch._utils", "_rebuild_tensor_v2"): usual_tensor,
}


def call(function: Any, given: Any, plain: bool) -> Any:
    """Return what stands for the result of a call.

    Args:
        function: what the pickle would call.
        given: with what.
        plain: whether the pickle was not written by ``torch.save``.

    Raises:
        CheckpointError: the call could do harm.
    """
    args = as_tuple(given)
    quick = _QUICK.get(function) if type(function) is GlobalRef else None
    if quick is not None and (made := quick(args)) is not None:
        return made
    if function == _GETATTR and (nested := _nested_class(args)) is not None:
        return nested
    # each turn unwraps one layer, so that a file cannot make this recurse
    is_parameter = False
    states: tuple[Any, ...] = ()
    turns = 0
    while isinstance(function, GlobalRef) and (turns := turns + 1) < _MAX_LAYERS:
        if function in _FROM_TYPE and len(args) >= 3:
            check_state(None, args[3] if len(args) > 3 else None)
            is_parameter |= args[1] == GlobalRef("torch.nn.parameter", "Parameter")
            states += args[3:4]
            function, args = args[0], as_tuple(args[2])
        elif function in _NEW_OBJECT and args:
            function, args = args[0], args[1:]
        else:
            break
    if not isinstance(function, GlobalRef):
        if not isinstance(function, Opaque):
            raise TypeError("something is called that cannot be")
        raise _harm(f"the result of {function.made_by or 'something unknown'}", args)
    made = _plain_data(function, args)
    if made is None:
        made = rebuild(function, args)
    if made is None:
        _judge(function, args, plain)
        return _unwrapped(function, args) or Opaque(function, args)
    if isinstance(made, TensorRef):
        for state in states:
            made = with_state(made, (state,))
        return replace(made, is_parameter=True) if is_parameter else made
    return made


def as_tuple(args: Any) -> tuple[Any, ...]:
    """Return a call's arguments, which must be a tuple."""
    if not isinstance(args, tuple):
        raise TypeError("a call's arguments are no tuple")
    return args


def fill(target: dict[Any, Any], pairs: Iterable[Any]) -> None:
    """Set items, under keys whose hash can neither recurse nor be made to collide."""
    for key, value in pairs:
        plain = type(key) is str or key is None or type(key) in (bytes, bool)
        plain = plain or (type(key) is int and key.bit_length() < 60)  # abs() would copy it
        target[key if plain else Key(key)] = value


def _plain_data(function: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Return a real container where the call makes one, or ``None``."""
    if function in _DICTS:
        made: dict[Any, Any] = {}
        last = args[-1] if args else None  # a defaultdict's first argument is its factory
        if isinstance(last, dict):
            made.update(last)
        elif isinstance(last, list | tuple):
            fill(made, last)
        elif isinstance(last, GlobalRef) and is_weapon(last):
            raise _harm(str(last), ())
        return made
    if function in _SEQUENCES:
        return list(args[0]) if args and isinstance(args[0], list | tuple) else []
    if function in _TYPED_LISTS and args and isinstance(args[0], list | dict):
        return args[0]
    if function == GlobalRef("torch", "Size"):
        return args[0] if args and isinstance(args[0], tuple | list) else ()
    return None


def _judge(function: GlobalRef, args: tuple[Any, ...], plain: bool) -> None:
    handed = next((arg for arg in args if isinstance(arg, GlobalRef) and is_weapon(arg)), None)
    if handed is not None:
        raise _harm(str(handed), ())
    if plain and str(function) == "torch.storage._load_from_bytes":
        return
    if function.module.startswith("torch.fx.") and "graph_module" in function.name:
        what = "holds a torch.fx module, whose Python code loading it would run; nothing was executed"
        raise CheckpointError(
            what,
            got=printable(str(function)),
            remedy="if you trust where it came from, load it there and save model.state_dict()",
        )
    if is_harmful(function) and not _only_data(function, args):
        raise _harm(str(function), args)


def _unwrapped(function: GlobalRef, args: tuple[Any, ...]) -> Opaque | None:
    """Return the module in ``torch.compile``'s wrapper, which calls its second argument."""
    if function.name != "OptimizedModule" or not is_compiled(function) or len(args) != 2:
        return None
    module, context = args
    maker = context.made_by if isinstance(context, Opaque) else None
    if maker is None or not is_compiled(maker) or not isinstance(module, Opaque):
        raise _harm(str(function), args)
    return replace(module)  # so that what this is given later does not change the module


def check_state(target: Any, state: Any) -> None:
    """Refuse attributes by which restoring an object's state would run code.

    Args:
        target: the object; its items may be its attributes.
        state: what it would be given: attributes, or a pair of which the second is attributes.

    Raises:
        CheckpointError: it could do harm.
    """
    if isinstance(target, GlobalRef):
        raise _harm(f"new attributes of {target}", ())
    given = [state, *state[:2]] if isinstance(state, tuple) else [state]
    if isinstance(target, Opaque):
        given += [target.mapping, target.state, *target.args[-4:]]
    if any(isinstance(part, dict) and "__setstate__" in part for part in given):
        raise _harm("a __setstate__ of its own", ())


def check_adding(target: Opaque) -> None:
    """Refuse to add items to an object that was given its own way to add them.

    Raises:
        CheckpointError: it could do harm.
    """
    parts = [*target.state[:2]] if isinstance(target.state, tuple) else [target.state]
    if any(isinstance(part, dict) and name in part for part in (*parts, target.mapping) for name in _CALLED):
        raise _harm("a method of an object's own", ())


def _only_data(function: GlobalRef, args: tuple[Any, ...]) -> bool:
    """Tell whether a call only makes a type, a bound method or an iterator, which depends on of what."""
    name = str(function)
    if name == "builtins.type":
        return len(args) == 1 and args[0] is None
    if name == "operator.getitem" and len(args) == 2 and isinstance(args[0], GlobalRef):  # list[int]
        return args[0].module in ("typing", "collections.abc", "builtins") and "." not in args[0].name
    if name == "functools.reduce":  # int | None
        return len(args) == 2 and args[0] == _OR and isinstance(args[1], list | tuple)
    if name in ("builtins.iter", "builtins.reversed", "builtins.enumerate", "builtins.zip"):
        return not any(isinstance(arg, GlobalRef) for arg in args)
    # a hook that is an object's method; calling it, as calling anything opaque, is refused
    if function == _GETATTR and len(args) == 2 and isinstance(args[1], str):
        plain = not args[1].startswith("__") or args[1] == "__call__"
        return plain and not isinstance(args[0], GlobalRef)
    return False


def _nested_class(args: tuple[Any, ...]) -> GlobalRef | None:
    """Return what ``getattr(Outer, "Inner")`` names, as pickle protocol 2 writes a nested class."""
    if len(args) != 2 or not isinstance(args[0], GlobalRef) or not isinstance(args[1], str):
        return None
    outer, name = args
    if name.startswith("__") or len(outer.name) + len(name) > 500:
        return None
    return GlobalRef(outer.module, f"{outer.name}.{name}")  # judged like any other name when it is called


def _harm(name: str, args: tuple[Any, ...]) -> CheckpointError:
    first = args[0] if args else None
    shown = repr(printable(first, 60)) if isinstance(first, str) else ("…" if args else "")
    return CheckpointError(
        f"loading it would run {printable(name)}({shown}); nothing was executed",
        remedy="do not load this file with torch.load(weights_only=False); get a safe copy (safetensors)",
    )
