"""Run a function on a stranger's text in a child process, with a limit of time and memory.

The child is a fresh interpreter and not a fork: this process has threads (torch, tokenizers), and a fork copies their
locks as they are at that moment. It imports one light module and starts in about 0.15 seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2.0, 512
_PATIENCE_S = 60.0  # wall clock, for a machine whose cores are busy; the limit of `seconds` counts CPU time
_EXCERPT = 300  # characters of an error
_MAX_REPLY = 16 << 20  # bytes; the names of all modules of the largest models take 5 MB


class Refused(Exception):
    """The function raised an error or went beyond its limits. The message is one line."""


def run_limited(
    function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS, megabytes: int = MEGABYTES
) -> Any:
    """`function(*arguments)`, computed in a child process that cannot write a file.

    Args:
        function: of a module that imports quickly; the child imports it by name. JSON must be able to hold the
            arguments and the value.
        seconds: CPU time, without the start of the child.
        megabytes: memory beyond that of the child at its start.

    Raises Refused with the reason if there is no value. The child has ended in any case.
    """
    request = {
        "path": [*(path for path in sys.path if isinstance(path, str)), str(Path(__file__).parents[2])],
        "module": function.__module__,
        "name": function.__name__,
        "arguments": arguments,
        "seconds": seconds,
        "megabytes": megabytes,
    }
    with subprocess.Popen(
        # -I: neither the current folder nor PYTHON* variables decide what is imported, only `path`. -S: no .pth file.
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us, and the whole group can be killed
    ) as child:
        try:
            output, _ = child.communicate(json.dumps(request).encode(), timeout=seconds + _PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Refused(f"it did not end within {seconds + _PATIENCE_S:g} seconds") from None
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode in (-signal.SIGPROF, -signal.SIGXCPU):
        raise Refused(f"it takes more than {seconds:g} seconds")
    try:
        reply = json.loads(output)
    except ValueError:  # the kernel ended it, or a library did
        raise Refused(f"its process ended with code {child.returncode}") from None
    if "reason" in reply:
        raise Refused(reply["reason"])
    return reply["value"]


def _serve() -> None:
    """Answer the one request on stdin."""
    request = json.load(sys.stdin.buffer)
    sys.path.extend(request["path"])  # behind Python's own: no file of a folder takes the place of its modules
    function = getattr(importlib.import_module(request["module"]), request["name"])
    _limit(request["seconds"], request["megabytes"])
    try:
        reply = json.dumps({"value": _value(function, request["arguments"])})
    except MemoryError:
        reply = json.dumps({"reason": f"it needs more than {request['megabytes']} MB of memory"})
    except RecursionError:
        reply = json.dumps({"reason": "it is nested or recursive without end"})
    except Exception as error:
        reply = json.dumps({"reason": " ".join(str(error).split())})
    if len(reply) > _MAX_REPLY:
        reply = json.dumps({"reason": f"its answer is longer than {_MAX_REPLY >> 20} MB"})
    sys.stdout.buffer.write(reply.encode())
    sys.stdout.buffer.flush()
    os._exit(0)  # freeing gigabytes of small objects takes seconds


def _value(function: Callable[..., Any], arguments: list[Any]) -> Any:
    try:
        return function(*arguments)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the text of an error may be too long or too deep, too
        raise Refused(f"{type(error).__name__}: {str(error)[:_EXCERPT]}") from None


def _limit(seconds: float, megabytes: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + (megabytes << 20) if pages else resource.RLIM_INFINITY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 16,  # Python opens its own modules: an encoding, what an error needs
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: int(seconds) + 10,  # if the timer below is lost
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = (
            value if hard == resource.RLIM_INFINITY else hard if value == resource.RLIM_INFINITY else min(value, hard)
        )
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGXCPU})
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    _serve()
