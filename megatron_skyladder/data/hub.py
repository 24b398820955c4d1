"""Whether a tokenizer named like one of the Hugging Face hub can be had, found out in seconds.

The hub's library asks five times, waiting longer each time, before it gives up: where a folder was
misspelt, or where there is no network, that is a minute for each process.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable

SECONDS = 5.0  # to answer in
FILES = ("tokenizer_config.json", "tokenizer.json", "config.json")


def is_local_only(name: str) -> bool:
    """Return whether to take a tokenizer from the cache, since the hub does not answer.

    Args:
        name: that is no file or folder here, and so taken for one of the hub.

    Raises:
        ValueError: it is neither here, nor in the cache, nor on the hub.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        _in_time(lambda: HfApi().model_info(name, timeout=SECONDS))
    except HFValidationError:
        raise ValueError(_missing(name, "and it is no name of the hub either")) from None
    except RepositoryNotFoundError:
        raise ValueError(
            _missing(name, "and the hub has none of this name that you may see (hf auth login)")
        ) from None
    except HfHubHTTPError:
        return False  # it answers: whoever loads will hear what is wrong
    except Exception as error:  # whatever its HTTP library raises where there is no network
        if _is_cached(name):
            return True
        why = f"and the hub does not answer ({type(error).__name__}: {error})"
        raise ValueError(_missing(name, why)) from None
    return False


def _in_time(ask: Callable[[], object]) -> None:
    """Ask, and wait no longer than for two answers: looking up an address knows no time limit."""
    errors: list[Exception] = []

    def asking() -> None:
        try:
            ask()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(2 * SECONDS)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError(f"no answer in {2 * SECONDS:g} s")


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES)


def _missing(name: str, why: str) -> str:
    return (
        f"--tokenizer-model={name} is no file or folder here, {why}. Give the path of the "
        f"tokenizer's folder, or fetch it where there is a network: hf download {name} --local-dir "
        "tokenizer."
    )
