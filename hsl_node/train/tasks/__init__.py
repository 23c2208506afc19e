"""What is asked of an image, one file per kind of answer; by the name that the method's card has."""

from __future__ import annotations

from collections.abc import Mapping

from hsl_node.train.task import Task
from hsl_node.train.tasks.classification import CLASSIFICATION

TASKS: Mapping[str, Task] = {task.name: task for task in (CLASSIFICATION,)}
