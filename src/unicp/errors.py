"""The one exception of the library, and its one warning."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnicpError(ValueError, RuntimeError):
    """Raised for everything that unicp refuses: a wrong value, an unknown model, a broken file.

    It is a ``ValueError`` and a ``RuntimeError``, so that callers who expect either catch it. The message has one
    or two lines: what was wrong, with which value, and what to do.
    """


class UnicpWarning(UserWarning):
    """Warns that something works, but probably not as the user meant it."""


def unknown(kind: str, value: object, known: Iterable[object]) -> UnicpError:
    """The error for a name that is not in a list of names; it suggests the nearest one.

    >>> print(unknown("method", "adacash", ["none", "adacache"]))
    unknown method 'adacash'; known: none, adacache. Did you mean 'adacache'?
    """
    names = [str(name) for name in known]
    message = f"unknown {kind} {value!r:.80}; known: {', '.join(names)}."
    near = difflib.get_close_matches(str(value), names, n=1)
    return UnicpError(message + (f" Did you mean {near[0]!r}?" if near else ""))


def missing_extra(library: str, extra: str, purpose: str) -> UnicpError:
    """The error for an optional dependency that is not installed.

    >>> print(missing_extra("matplotlib", "plots", "figures"))
    figures need matplotlib, which is not installed; run: pip install 'unicp[plots]', or '.[plots]' in a clone
    """
    install = f"pip install 'unicp[{extra}]', or '.[{extra}]' in a clone"
    return UnicpError(f"{purpose} need {library}, which is not installed; run: {install}")


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of an error's message, at most ``longest`` characters; errors other than ours begin with their
    class.

    >>> first_line(KeyError())
    'KeyError'
    >>> first_line(TypeError("no number\\nand more")), first_line(UnicpError("no number"))
    ('TypeError: no number', 'no number')
    """
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    text = kind if not lines else lines[0].strip() if isinstance(error, UnicpError) else f"{kind}: {lines[0].strip()}"
    return text if len(text) <= longest else text[: longest - 3] + "..."
