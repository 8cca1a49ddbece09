"""Values from their text: what `--set path.to.field=VALUE` accepts, by a field's type.

A value is written as Python would show it: 1e-3, None, V3 (a member of an enum),
bfloat16, (0.8, 0.9), Cosine(peak=1e-3). Text needs no quotes.
"""

import ast
import difflib
import enum
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.errors import UserError

_SHOWN = 12  # names that a message lists when none is near


def parse(text: str, hint: Any) -> Any:
    """A value of the type `hint` from its text. Raises UserError when it is none.

    Of a union the first type that fits is taken; plain text comes last.
    """
    kinds = (hint,) if hint == DTypeLike else members(hint)
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return _parse(text, kind)
        except _OtherTypeError:
            pass
    names = " or ".join(_name(kind) for kind in kinds)
    raise UserError(f"{text!r} is no {names}")


class _OtherTypeError(Exception):
    """The text may be a value of another type of the union."""


def _parse(text: str, kind: Any) -> Any:
    if kind == DTypeLike:
        return _dtype(text)
    if get_origin(kind) is tuple:
        return _tuple(text, kind)
    if is_dataclass(kind):
        return _record(text, kind)
    if kind is not type(None) and issubclass(kind, enum.Enum):
        return _member(text, kind)
    if kind in _PLAIN:
        try:
            return _PLAIN[kind](text)
        except (ValueError, KeyError, OverflowError, SyntaxError):
            raise _OtherTypeError from None
    raise TypeError(f"no text form of {kind}")


def _whole(text: str) -> int:
    """A whole number, also as 1e9."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != int(number):
            raise
        return int(number)


def _text(text: str) -> str:
    return ast.literal_eval(text) if text[:1] in ("'", '"') else text


_PLAIN = {
    type(None): {"None": None, "none": None}.__getitem__,
    bool: {"True": True, "true": True, "False": False, "false": False}.__getitem__,
    int: _whole,
    float: float,
    str: _text,
}


def _dtype(text: str) -> Any:
    try:
        dtype = jnp.dtype(text)
    except TypeError:
        raise _OtherTypeError from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise _OtherTypeError
    return dtype.name


def _member(text: str, kind: type[enum.Enum]) -> enum.Enum:
    """A member by name or value, with or without its class before it."""
    name = text.removeprefix(f"{kind.__name__}.").lower()
    for member in kind:
        if name in (member.name.lower(), str(member.value).lower()):
            return member
    raise UserError(f"{text!r} is none of {', '.join(m.name for m in kind)}")


def _tuple(text: str, kind: Any) -> tuple:
    """(a, b), [a, b] or a, b; elements as `parse` reads them."""
    tree = _expression(text)
    if not isinstance(tree, ast.Tuple | ast.List):
        raise _OtherTypeError
    kinds = elements(kind, len(tree.elts))
    if len(kinds) != len(tree.elts):
        raise UserError(f"{text!r} has {len(tree.elts)} elements, not {len(kinds)}")
    return tuple(parse(ast.unparse(part), k) for part, k in zip(tree.elts, kinds))


def _record(text: str, kind: type) -> Any:
    """Record(field=value, ...), or Record alone for its defaults."""
    tree = _expression(text)
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.func.id != kind.__name__:
        raise _OtherTypeError
    hints, given = get_type_hints(kind), {}
    for keyword in call.keywords:
        if keyword.arg not in hints:
            known = near(str(keyword.arg), hints)
            raise UserError(f"{kind.__name__} has no field {keyword.arg!r}{known}")
        given[keyword.arg] = parse(ast.unparse(keyword.value), hints[keyword.arg])
    try:
        return kind(*call.args, **given)
    except TypeError:  # an argument is missing, or has no name
        names = ", ".join(field.name for field in fields(kind))
        raise UserError(f"{text!r}: {kind.__name__} needs fields of {names}") from None


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise _OtherTypeError from None


def _name(kind: Any) -> str:
    if kind == DTypeLike:
        return "floating-point dtype"
    return {int: "whole number", type(None): "None"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def elements(kind: Any, count: int) -> list[Any]:
    """The types of a tuple's `count` elements."""
    arguments = get_args(kind)
    return [arguments[0]] * count if arguments[-1] is Ellipsis else list(arguments)


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; another type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def near(name: str, names: Iterable[str]) -> str:
    """The end of a message on an unknown name: those that it may have meant."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f": near it {', '.join(close)}"
    return f": it has {', '.join(names)}" if 0 < len(names) <= _SHOWN else ""
