"""What all tests share: shapes that are checked, one thread, the same examples each time."""

import os
import signal
import tempfile

import jaxtyping
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels are run by Python then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anything imports reformer: from here on each call checks the shapes in its annotations.
jaxtyping.install_import_hook("reformer", "beartype.beartype")

torch.set_num_threads(1)

# Sweeps of the tests wait for each other, and not for what else is measured on this machine.
_LOCKS = tempfile.TemporaryDirectory(prefix="harness-locks-")
os.environ.setdefault("HARNESS_LOCKS", _LOCKS.name)

# The background job of a shell ignores interrupts, and so would every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
