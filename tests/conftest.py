"""What all tests share: shapes that are checked, one thread, the same examples each time."""

import jaxtyping
import torch
from hypothesis import settings

# Before anything imports reformer: from here on each call checks the shapes in its annotations.
jaxtyping.install_import_hook("reformer", "beartype.beartype")

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
