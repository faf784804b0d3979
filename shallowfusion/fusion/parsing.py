"""Rules as text, for command lines and decoder files: `internal_lm(0.8, 0.2, variant='silence')`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion import catalogue
from shallowfusion.fusion.rules import Rule

__all__ = ["RULE_NAMES", "parse_rule"]

# `gated` takes a gate object, which no literal can say.
RULE_NAMES: tuple[str, ...] = tuple(name for name in catalogue.__all__ if name != "gated")
_LONGEST = 10_000


def parse_rule(text: str) -> Rule:
    """The rule a call of a constructor of `shallowfusion.fusion` makes.

    Nothing is evaluated but such calls, which may stand inside each other (by_class(static(0.5), digits=0.2)), and
    literals: numbers, text, True, False, None, and tuples or lists of them.

    Args:
        text: for instance "static(0.24)", "static((0.3, 0.1))" for two language models, "internal_lm(0.8, 0.2)".

    Raises:
        InvalidArgumentError: no such call, an unknown name, or arguments the constructor refuses.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST:
        raise InvalidArgumentError(f"a rule must be text such as 'static(0.24)', got {str(text)[:80]!r}.")
    return _made(_call(text), text)


def _made(call: ast.Call, text: str) -> Rule:
    name = call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    if name not in RULE_NAMES:
        raise InvalidArgumentError(f"unknown rule {name!r}; known are {', '.join(RULE_NAMES)}.")
    constructor: Callable[..., Rule] = getattr(catalogue, name)
    positional, named = _literals(call, text)
    try:
        inspect.signature(constructor).bind(*positional, **named)
        return constructor(*positional, **named)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"the rule {text.strip()!r} is refused: {error}") from error
    except TypeError as error:
        raise InvalidArgumentError(
            f"the rule {text.strip()!r} does not fit {name}{_signature(constructor)}: {error}."
        ) from error


def _call(text: str) -> ast.Call:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or "it is too deep"
        raise InvalidArgumentError(
            f"the rule {text[:80]!r} cannot be read ({reason}); write it as 'static(0.24)'."
        ) from None
    if not isinstance(tree.body, ast.Call):
        raise InvalidArgumentError(
            f"the rule {text[:80]!r} is no call of a constructor; write it as 'static(0.24)', with one of "
            f"{', '.join(RULE_NAMES)}."
        )
    return tree.body


def _literals(call: ast.Call, text: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        positional = [_value(argument, text) for argument in call.args]
        named: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("** is not allowed")
            named[keyword.arg] = _value(keyword.value, text)
    except InvalidArgumentError:
        raise
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise InvalidArgumentError(
            f"the arguments of the rule {text[:80]!r} must be literals: numbers, text, True, False, None, or tuples."
        ) from None
    return positional, named


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RULE_NAMES:
        return _made(node, text)
    return ast.literal_eval(node)


def _signature(constructor: Callable[..., Rule]) -> str:
    return f"({', '.join(inspect.signature(constructor).parameters)})"
