"""A called reward: any Python function as a reward, with a cache, time limit, retries and several calls at a time.

Functions are called with what they take (`reward_models.signature`), once for all responses, or once per response where
they say so (`per_response`). Both may be ``async``. What is in the cache is not called again. What was paid for is in
the cache before an error of another response is raised.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reward_models.attempts import Ended, LateError, Limits, ended_calls, may_pass, wait_sec
from reward_models.reward_cache import RewardCache, reward_key
from reward_models.signature import Arguments, Signature, columns_of, is_finite_number, name_of, place_of, version_of
from vgf_llm.console.screen import say
from vgf_llm.data.dialogue import PromptText, as_messages
from vgf_llm.errors import ConfigError, ModelError, VGFError
from vgf_llm.settings import RewardCallSettings

_OWN = ("reward_models.functions", "reward_models.constraints")  # cheaper to call than to look up
_told: set[str] = set()  # rewards that were said to hold up the loop


class CalledReward:
    """A function as a reward: ``(prompts, responses) -> rewards``, one finite number per response.

    Args:
        function: As `reward_models.functions` describes it.
        calls: Cache, time limit, retries, concurrency.
        name: Part of the cache's key, such as "module:function"; by default the function's own module and name, which
            functions of one factory share.
        constants: Arguments of the function that are the same for every response.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        calls: RewardCallSettings | None = None,
        *,
        name: str | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        calls = calls or RewardCallSettings(reward_retries=0)
        self.function, self.signature = function, Signature(function, constants)
        self.signature.check_constants()
        self.__name__ = name_of(function)
        self.name = name or f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', self.__name__)}"
        own = getattr(function, "__module__", "") in _OWN
        self.cache = None if calls.reward_cache is None or own else RewardCache(calls.reward_cache)
        timeout_sec = calls.reward_timeout_sec or getattr(function, "timeout_sec", None)
        self.limits = Limits(timeout_sec, calls.reward_retries, calls.reward_concurrency)
        self.is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    @functools.cached_property
    def version(self) -> str:
        """Part of the cache's key: the stated version, or a digest of the files of function and module."""
        return version_of(self.function, self.name)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return one reward per response.

        Raises:
            ConfigError: It takes a column that the rows do not have.
            DataError: It takes a column that one of the rows does not have.
            ModelError: A call raises, is late, or returns something else than one finite number per response.
            OutputError: The cache cannot be used.
        """
        arguments = self.signature.arguments(prompts, responses)
        if self.cache is None:
            found: dict[int, float] = {}
            for rewards in self._paid(list(range(len(responses))), arguments, prompts, responses):
                found |= rewards
            return [found[index] for index in range(len(responses))]
        keys = self._keys(prompts, responses)
        known = self.cache.get(list(dict.fromkeys(keys)))
        missing = {key: index for index, key in enumerate(keys) if key not in known}
        for rewards in self._paid(list(missing.values()), arguments, prompts, responses):
            new = {keys[index]: reward for index, reward in rewards.items()}
            self.cache.put(self.name, new)
            known |= new
        return [known[key] for key in keys]

    def _keys(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        read, constants = self.signature.read_columns(columns_of(prompts)), self.signature.constants
        keys = []
        for prompt, response in zip(prompts, responses, strict=True):
            text = PromptText(prompt)
            columns = {name: text.columns.get(name) for name in read} | constants
            keys.append(reward_key(self.name, self.version, prompt, as_messages(text.prompt), response, columns))
        return keys

    def _paid(
        self, indices: list[int], arguments: Arguments, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterator[dict[int, float]]:
        """Call for some responses, and yield rewards by response as calls end; raise the first error at the end."""
        one_by_one = self.signature.one_by_one
        units = [[index] for index in indices] if one_by_one else [indices] if indices else []
        failed: Exception | None = None
        for ended in self._ended(units, arguments):
            unit = units[ended.index]
            if ended.error is not None:
                failed = failed or self._failure(ended.error, unit, prompts, responses)
                continue
            good, error = self._checked([ended.value] if one_by_one else ended.value, unit, prompts, responses)
            failed = failed or error
            yield good
        if failed is not None:
            raise failed

    def _ended(self, units: list[list[int]], arguments: Arguments) -> Iterable[Ended]:
        calls = [self._call(arguments.of(unit)) for unit in units]
        if self.signature.one_by_one or self.is_async or self.limits.timeout_sec is not None:
            is_good = is_finite_number if self.signature.one_by_one else lambda value: True
            side_by_side = len(calls) > 1 and self.limits.concurrency > 1
            watched = self.is_async and (side_by_side or self.limits.timeout_sec is not None)
            return ended_calls(calls, self.limits, is_good, self._tell_stalled if watched else None)
        return [_here(index, call, self.limits.retries) for index, call in enumerate(calls)]

    def _tell_stalled(self) -> None:
        """Say once per process that an ``async`` function waits without ``await``."""
        if self.name not in _told:
            _told.add(self.name)
            say(
                f"warning: reward {self.__name__} is async, and waits for over a second without await (time.sleep, "
                "requests, a long computation): its calls run one after another, so that reward_concurrency and "
                "reward_timeout_sec do nothing; await what waits (asyncio.sleep, httpx.AsyncClient), or drop `async`: "
                "a plain function gets a thread per call"
            )

    def _call(self, arguments: Arguments) -> Callable[[], Any]:
        by_place, by_name = arguments.by_place, arguments.by_name
        if self.signature.one_by_one:
            by_place, by_name = [values[0] for values in by_place], {key: value[0] for key, value in by_name.items()}

        def call() -> Any:
            # copies, so that a function may change its lists, and another attempt finds them as they were
            names = {name: _copied(values) for name, values in by_name.items()}
            return self.function(*(_copied(values) for values in by_place), **names)

        call.is_async = self.is_async  # type: ignore[attr-defined]
        return call

    def _checked(
        self, returned: Any, unit: list[int], prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[dict[int, float], ModelError | None]:
        """Return the good rewards of a call by response, and what is wrong with the others."""
        try:
            rewards = listed(self.__name__, returned, len(unit))
        except ModelError as error:
            return {}, error
        good, wrong = {}, None
        for index, reward in zip(unit, rewards, strict=True):
            if is_finite_number(reward):
                good[index] = float(reward)
            elif wrong is None:
                wrong = not_finite(self.__name__, reward, index, prompts[index], responses[index])
        return good, wrong

    def _failure(
        self, error: BaseException, unit: list[int], prompts: Sequence[str], responses: Sequence[str]
    ) -> Exception:
        """Return the error of a call as one that names the response."""
        where = place_of(prompts[unit[0]], responses[unit[0]])
        if isinstance(error, VGFError):
            named = type(error) in (ConfigError, ModelError) and self.signature.one_by_one
            return type(error)(f"{error}; it was asked about {where}") if named else error
        where = where if self.signature.one_by_one else f"{len(unit)} responses; the first: {where}"
        kept = "" if self.cache is None else f"; rewards paid for before are in '{self.cache.path}'"
        attempts = self.limits.retries + 1 if may_pass(error) else 1
        tried = f" in {attempts} attempts" if attempts > 1 else ""
        if isinstance(error, LateError):
            failure = ModelError(
                f"reward {self.__name__} was late{tried}: {error}, for {where}{kept}; raise reward_timeout_sec"
            )
        else:
            failure = ModelError(
                f"reward function {self.__name__} raised {type(error).__name__}{tried}: {error}; for {where}{kept}; "
                "mend it, or name another one"
            )
        failure.__cause__ = error
        return failure


def _here(index: int, call: Callable[[], Any], retries: int) -> Ended:
    """Make a call in this thread, as a function may expect that sets an alarm or keeps a model."""
    for attempt in range(retries + 1):
        try:
            return Ended(index, call())
        except Exception as error:  # the user's code may raise anything
            if attempt == retries or not may_pass(error):
                return Ended(index, error=error)
            time.sleep(wait_sec(attempt, error))
    raise AssertionError("unreachable")


def _copied(values: Any) -> Any:
    return list(values) if isinstance(values, list) else dict(values) if isinstance(values, dict) else values


def listed(name: str, rewards: Any, count: int) -> list[Any]:
    """Return what a function returned as a list of one reward per response.

    Raises:
        ModelError: It is something else.
    """
    try:
        if isinstance(rewards, Mapping | set | str | bytes):
            raise TypeError(f"it returned a {type(rewards).__name__}, where one number per response is expected")
        found = list(rewards)
    except TypeError as error:
        raise ModelError(
            f"reward function {name} raised TypeError on {count} responses: {error}; mend it, or name another one"
        ) from error
    if len(found) != count:
        raise ModelError(f"reward function {name} returned {len(found)} rewards for {count} responses")
    return found


def not_finite(name: str, reward: Any, index: int, prompt: str, response: str) -> ModelError:
    """Return the error of a reward that is not a finite number."""
    place = getattr(prompt, "place", "")
    where = f"{place}, the prompt {str(prompt)[:60]!r}" if place else f"the prompt {str(prompt)[:60]!r}"
    return ModelError(
        f"reward function {name} returned {reward!r} for response {index} ({response[:60]!r}) to {where}; "
        "every reward must be a finite number"
    )
