"""The tasks by name: the one place where a new task is added, by an import and its class in ``TASKS``."""

from mitrain.tasks.answer import AnswerTask
from mitrain.tasks.base import Task
from mitrain.tasks.caption import CaptionTask
from mitrain.tasks.classify import ClassifyTask
from mitrain.tasks.regress import RegressTask
from mitrain.tasks.retrieve import RetrieveTask
from mitrain.tasks.segment import SegmentTask

ALL = (AnswerTask, CaptionTask, SegmentTask, ClassifyTask, RegressTask, RetrieveTask)
TASKS: dict[str, type[Task]] = {task.settings.section_name: task for task in ALL}
