"""Arguments of a reward function, filled by place and by name: texts, messages, rows and single columns.

The first two parameters are the prompts and the responses, unless responses are named elsewhere: then what is not is a
column, as `answer` in ``exact(responses, answer)``. A parameter named ``messages`` gets the conversations as
lists of ``{"role", "content"}``, ``rows`` gets every column of the data rows, and any other name gets that column.
A function that scores one response per call (`per_response`) gets one item of each, and ``row`` in place of ``rows``.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from vgf_llm.data.dialogue import PromptText, as_messages
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.runs.files import shorten

Function = TypeVar("Function", bound=Callable[..., Any])

_PLURAL = {"prompt": "prompts", "response": "responses", "row": "rows"}
_FILLED = ("prompts", "responses", "messages", "rows")


@overload
def per_response(function: Function) -> Function: ...


@overload
def per_response(*, version: str | None = None) -> Callable[[Function], Function]: ...


def per_response(function: Any = None, *, version: str | None = None) -> Any:
    """Mark a function, or ``async def``, that scores one response per call: it is called for several at a time.

        @per_response(version="2")
        async def judge(messages: list[dict], response: str, row: dict) -> float: ...

    Args:
        function: Takes a prompt and a response by place, and ``messages``, ``row`` and columns by name.
        version: Part of the key under which rewards are cached; by default the content of the function's file is.

    Returns:
        The same function.
    """

    def mark(marked: Any) -> Any:
        marked.per_response = True
        if version is not None:
            marked.version = version
        return marked

    return mark if function is None else mark(function)


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call for several responses.

    Attributes:
        by_place: Lists with a value per response.
        by_name: The same by parameter.
    """

    by_place: list[list[Any]]
    by_name: dict[str, list[Any]]

    def of(self, indices: Sequence[int]) -> Arguments:
        """Return those of some responses, in lists of their own."""
        names = {name: [values[i] for i in indices] for name, values in self.by_name.items()}
        return Arguments([[values[i] for i in indices] for values in self.by_place], names)


class Signature:
    """Parameters of a reward function.

    Args:
        function: Any callable.
        constants: Values that stand for columns, the same in every row.
    """

    def __init__(self, function: Callable[..., Any], constants: Mapping[str, Any] | None = None) -> None:
        self.name = name_of(function)
        self.constants = dict(constants or {})
        self.one_by_one = bool(getattr(function, "per_response", False))
        self.places = list(_FILLED[:2])
        self.by_name: dict[str, str] = {}
        self.columns: dict[str, bool] = {}  # whether each is needed
        self.takes_all, self._taken = False, set[str]()
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a built-in without a signature
            return
        self._read(parameters)

    def _read(self, parameters: list[inspect.Parameter]) -> None:
        named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        first = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][:2]
        if any(one.kind is one.VAR_POSITIONAL for one in parameters):
            first = []  # all of them may be taken by place
        told = {name for one in (*first, *named) if (name := self._filled(one.name))}
        places: list[str] = []
        for one, place in zip(first, _FILLED, strict=False):
            filled = self._filled(one.name)
            if filled is None and place in told and one.kind is not one.POSITIONAL_ONLY:
                break  # a column, which is filled by name, and so is what follows
            places.append(filled or place)
        first = first[: len(places)]
        rest = [one for one in named if one not in first]
        if len(places) == 2 or told:  # else it is called with two, and Python says what is wrong
            self.places = places
        self.by_name = {one.name: name for one in rest if (name := self._filled(one.name))}
        self.columns = {one.name: one.default is one.empty for one in rest if one.name not in self.by_name}
        self.takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        self._taken = {one.name for one in first}

    def _filled(self, name: str) -> str | None:
        """Return what is filled in for a parameter's name; None for a column's."""
        if self.one_by_one:
            name = _PLURAL.get(name, name)
        return name if name in _FILLED else None

    def check_rows(self, prompts: Sequence[str]) -> None:
        """Refuse rows without a column that a parameter without a default asks for.

        Raises:
            ConfigError: No row has it.
            DataError: A row does not have it; the message names row and column.
        """
        self.read_columns(columns_of(prompts))
        needed = [name for name, is_needed in self.columns.items() if is_needed and name not in self.constants]
        for prompt in prompts if needed else ():
            for name in needed:
                if name not in getattr(prompt, "columns", {}):
                    where = getattr(prompt, "place", "") or f"the prompt {shorten(repr(str(prompt)))}"
                    raise DataError(
                        f"{where}: no column {name!r}, which reward function {self.name} takes; give the row a value, "
                        "or the parameter a default"
                    )

    def read_columns(self, there: Sequence[str]) -> list[str]:
        """Return the columns that the function reads, of those that there are.

        Raises:
            ConfigError: A parameter without a default is not a column of any row.
        """
        for name, needed in self.columns.items():
            if needed and name not in there and name not in self.constants:
                raise ConfigError(
                    f"reward function {self.name} takes {name!r}, and the prompts' rows have no such column; "
                    f"columns: {', '.join(there) or 'none'}"
                )
        if "rows" in (*self.places, *self.by_name.values()):
            return [name for name in there if name not in self.constants]
        return [name for name in there if name not in self.constants and self._takes(name)]

    def check_constants(self) -> None:
        """Refuse constants that the function does not take.

        Raises:
            ConfigError: Naming the first, and what it takes.
        """
        for name in self.constants:
            if not self._takes(name):
                taken = ", ".join(self.columns) or "none"
                raise ConfigError(f"arguments: {self.name} does not take {name!r}; it takes {taken}")

    def _takes(self, name: str) -> bool:
        return name in self.columns or (self.takes_all and name not in self._taken and name not in self.by_name)

    def arguments(self, prompts: Sequence[str], responses: Sequence[str]) -> Arguments:
        """Return the arguments of a call.

        Args:
            prompts: Those of `vgf_llm.data.dialogue.PromptText` bring columns; others have none.
            responses: One per prompt.

        Raises:
            ConfigError: As for `check_rows`.
            DataError: As for `check_rows`.
        """
        self.check_rows(prompts)
        rows = [getattr(prompt, "columns", {}) for prompt in prompts]
        made: dict[str, Callable[[], list[Any]]] = {
            "prompts": lambda: list(prompts),
            "responses": lambda: list(responses),
            "messages": lambda: [[dict(turn) for turn in as_messages(PromptText(one).prompt)] for one in prompts],
            "rows": lambda: [{**row, **self.constants} for row in rows],
        }
        by_name = {name: made[what]() for name, what in self.by_name.items()}
        for name in dict.fromkeys((*columns_of(prompts), *self.constants)):
            if name not in by_name and self._takes(name):
                by_name[name] = [self.constants[name] if name in self.constants else row.get(name) for row in rows]
        return Arguments([made[place]() for place in self.places], by_name)


def columns_of(prompts: Sequence[str]) -> list[str]:
    """Return the names of the columns of the prompts' rows, in order of first appearance."""
    return list(dict.fromkeys(name for prompt in prompts for name in getattr(prompt, "columns", {})))


def name_of(function: Any) -> str:
    """Return what a function is called in messages."""
    return str(getattr(function, "__name__", repr(function)))


def version_of(function: Any, name: str = "") -> str:
    """Return the version of a function: its attribute ``version``, or a digest of the files that it is written in.

    Args:
        function: Any callable.
        name: "module:function". The file of the module counts too: a decorator or a class may be written elsewhere.
    """
    stated = getattr(function, "version", None)
    if stated is not None:
        return str(stated)
    try:
        written = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called
        written = None
    module = getattr(sys.modules.get(name.rpartition(":")[0]), "__file__", None)
    files = [Path(path) for path in dict.fromkeys((written, module)) if path is not None and Path(path).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def place_of(prompt: str, response: str) -> str:
    """Return where a response belongs, for messages: file and row where they are known, prompt and response."""
    place = getattr(prompt, "place", "")
    text = f"the prompt {shorten(repr(str(prompt)))}, response {shorten(repr(response))}"
    return f"{place}: {text}" if place else text


def is_finite_number(reward: Any) -> bool:
    """Return whether it is a number, also NumPy's, or a tensor of one element; a text is not, whatever it says."""
    if isinstance(reward, str | bytes):
        return False
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
