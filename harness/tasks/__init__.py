"""What a model is asked to learn: generated tasks and real text, all offline, one task a file."""

from harness.tasks.copy import Copy
from harness.tasks.task import Batch, Task
from harness.tasks.text import Text

__all__ = ["Batch", "Copy", "Task", "Text"]
