"""What the parent and the measuring process agree on: JSON lines over a pipe, one a message.

The parent imports neither torch nor `reformer`, the measuring process neither Hydra nor pandas; this
module is all they share besides the record.

    greeting  {"protocol": 1, "harness": path of the loaded package}
    decode    {"op": "decode", "configs": [plain dicts], "check_device": bool, "forecast": bool}
              → {"results": [{"spec": {…}, "trial_id": "…", "backend": "…", "timed": bool,
                            "forecast": {…}, if asked for} | {"error": "one line", "trial_id": "…"}]}
    run       {"op": "run", "spec": {…}, "out": path, "log": path, "memory_limit_gib": number | null,
               "weights": path | null}
              → {"pid": n} at once, then {"exit": code | null, "signal": n | null, "oom_kill": bool}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

#: Raised whenever a message changes its meaning.
PROTOCOL = 1

#: What a line of the log starts with that is the trial's word on how far it is.
PROGRESS_PREFIX = "progress: "

#: What allocators, the kernel and the C++ runtime say when memory ran out.
OUT_OF_MEMORY = re.compile(
    r"can(?:'|no)t allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE
)


def next_message(buffer: bytearray, read_more: Callable[[], bool]) -> dict[str, Any] | None:
    """Take the next line out of what a pipe has brought; None if there is none and no more comes.

    Args:
        read_more: adds to the buffer; false if there is nothing to add.
    """
    # What has been searched is not searched again: the trials of a sweep are megabytes on one line.
    searched = 0
    while (end := buffer.find(b"\n", searched)) < 0:
        searched = len(buffer)
        if not read_more():
            return None
    message: dict[str, Any] = json.loads(buffer[:end])
    del buffer[: end + 1]
    return message


def now() -> str:
    """This moment as records write it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
