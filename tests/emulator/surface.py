"""Python modules generated from API dumps: what the real version lacks raises, and so does a wrong argument.

`trt_module(dump, behaviours)` turns the classes of a dump into Python classes whose methods check their arguments
against the real signatures and then call the behaviour of the same name; a method without a behaviour raises
NotImplementedError.
"""

from __future__ import annotations

import enum
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

UNSET = object()
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Misuse(AssertionError):  # noqa: N818 - it names what was done
    """The code under test did what the real library answers with a crash, a hang or wrong numbers."""


class EnumBase(enum.Enum):
    """Members convert to int, as those of the real enumerations do; the numbers are nobody's business."""

    def __int__(self) -> int:
        return self.value


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature."""

    name: str
    kind: str
    optional: bool


def parse_signature(text: str) -> list[Parameter]:
    """`name(self: X, a: int, b: str = None) -> R` without self."""
    inside = text[text.index("(") + 1 : _closing(text, text.index("("))]
    parameters = []
    for part in _split(inside):
        name, _, rest = part.partition(":")
        kind, equals, _ = rest.partition("=")
        if name.strip() != "self":
            parameters.append(Parameter(name.strip(), kind.strip(), bool(equals)))
    return parameters


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(text)


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in re.sub(r"->", "", text):
        depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


class Surface:
    """The classes and enumerations of one dump as a module."""

    def __init__(self, name: str, dump: Mapping[str, Any], behaviours: Mapping[str, type]) -> None:
        self.dump, self.behaviours = dump, behaviours
        self.module = types.ModuleType(name)
        self.module.__version__ = dump["version"]
        for kind, members in dump["enums"].items():
            setattr(self.module, kind, EnumBase(kind, {member: place for place, member in enumerate(members)}))
        self.severity = EnumBase("Severity", {member: place for place, member in enumerate(SEVERITIES)})
        for kind in dump["classes"]:
            if not hasattr(self.module, kind):
                self._add_class(kind)

    def make(self, kind: str, behaviour: object, *base_args: object) -> Any:
        """An object of a class that users cannot construct, backed by `behaviour`."""
        cls = getattr(self.module, kind)
        thing = cls.__new__(cls, *base_args)
        object.__setattr__(thing, "_impl", behaviour)
        return thing

    def _add_class(self, kind: str) -> None:
        if hasattr(self.module, kind):
            return
        entry = self.dump["classes"][kind]
        bases = []
        for base in entry["bases"]:
            if base in self.dump["classes"]:
                self._add_class(base)
                bases.append(getattr(self.module, base))
        behaviour = self.behaviours.get(kind)
        bases += [behaviour.BASE] if hasattr(behaviour, "BASE") else []
        body: dict[str, Any] = {"__setattr__": _guarded_setattr, "_impl": None, "_initialised": False}
        for item in entry["properties"]:
            body[item["name"]] = self._property(kind, item["name"], item["writable"])
        for name, signatures in entry["methods"].items():
            if name == "__init__":
                body[name] = self._constructor(kind, signatures)
            elif signatures and not name.startswith("__"):
                body[name] = self._method(kind, name, signatures)
        setattr(self.module, kind, type(kind, tuple(bases) or (object,), body))

    def _property(self, kind: str, name: str, writable: bool) -> Any:
        if kind in ("ILogger", "Logger") and name in SEVERITIES:
            return self.severity[name]

        def getter(thing: Any) -> Any:
            return getattr(thing._impl, name, None)

        def setter(thing: Any, value: Any) -> None:
            setattr(thing._impl, name, value)

        return property(getter, setter if writable else None)

    def _constructor(self, kind: str, signatures: list[str] | None) -> Callable:
        def construct(thing: Any, *args: object, **kwargs: object) -> None:
            if signatures is None:
                raise TypeError(f"{kind}: No constructor defined!")
            values = self._bind(kind, "__init__", signatures, args, kwargs)
            object.__setattr__(thing, "_initialised", True)
            behaviour = self.behaviours.get(kind)
            if behaviour is not None:
                object.__setattr__(thing, "_impl", behaviour(self, *values))

        return construct

    def _method(self, kind: str, name: str, signatures: list[str]) -> Callable:
        def call(thing: Any, *args: object, **kwargs: object) -> Any:
            values = self._bind(kind, name, signatures, args, kwargs)
            behaviour = getattr(thing._impl, name, None)
            if behaviour is None:
                raise NotImplementedError(f"the emulator does not do {kind}.{name}")
            return behaviour(*values)

        return call

    def _bind(
        self, kind: str, name: str, signatures: list[str], args: tuple, kwargs: Mapping[str, object]
    ) -> list[Any]:
        """The arguments in order, for the first overload that takes them; TypeError if none does."""
        for signature in signatures:
            values = self._match(parse_signature(signature), args, kwargs)
            if values is not None:
                return values
        given = ", ".join([type(value).__name__ for value in args] + [f"{k}=" for k in kwargs])
        raise TypeError(f"{kind}.{name}({given}): incompatible arguments; supported: {'; '.join(signatures)}")

    def _match(self, parameters: list[Parameter], args: tuple, kwargs: Mapping[str, object]) -> list[Any] | None:
        if len(args) > len(parameters) or kwargs.keys() - {p.name for p in parameters}:
            return None
        values = []
        for place, parameter in enumerate(parameters):
            value = args[place] if place < len(args) else kwargs.get(parameter.name, UNSET)
            if value is UNSET and not parameter.optional:
                return None
            if value is not UNSET and not self._accepts(parameter, value):
                return None
            values.append(None if value is UNSET else value)
        return values

    def _accepts(self, parameter: Parameter, value: object) -> bool:
        kind = parameter.kind.rpartition("::")[2]
        if value is None:
            return parameter.optional
        if kind in PLAIN:
            return PLAIN[kind](value)
        wanted = getattr(self.module, kind, None)
        if not isinstance(wanted, type):
            return True
        fits = isinstance(value, wanted)
        if fits and not getattr(value, "_initialised", True) and value._impl is None:
            raise TypeError(f"{kind}.__init__() must be called when overriding __init__")
        return fits


def _guarded_setattr(thing: Any, name: str, value: object) -> None:
    """C++ objects take no new attributes; subclasses written in Python do."""
    cls = type(thing)
    if isinstance(getattr(cls, name, None), property) or cls.__module__ != __name__:
        object.__setattr__(thing, name, value)
        return
    raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")


def _has_buffer(value: object) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return isinstance(value, int)


PLAIN = {
    "int": _is_integer,
    "typing.SupportsInt": _is_integer,
    "buffer": _has_buffer,
    "typing_extensions.Buffer": _has_buffer,
    "Dims": lambda value: isinstance(value, (tuple, list)) and all(map(_is_integer, value)),
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
}
"""Annotations of arguments that are plain Python -> whether a value is accepted."""


def cuda_module(name: str, dump: Mapping[str, Any], behaviours: Mapping[str, Callable]) -> types.ModuleType:
    """The functions of a dump: each checks the number of its arguments, then calls the behaviour of the same name."""
    module = types.ModuleType(name)
    for kind, members in dump["enums"].items():
        setattr(module, kind, EnumBase(kind, members))
    for constant, value in dump["constants"].items():
        setattr(module, constant, value)
    for function, arguments in dump["functions"].items():
        setattr(module, function, _function(function, len(arguments), behaviours.get(function)))
    return module


def _function(name: str, count: int, behaviour: Callable | None) -> Callable:
    def call(*args: object) -> tuple:
        if len(args) != count:
            raise TypeError(f"{name}() takes {count} arguments, {len(args)} given")
        if behaviour is None:
            raise NotImplementedError(f"the emulator does not do {name}")
        return behaviour(*args)

    return call
