"""Tasks: what a data set asks of a language model, and how its answers are trained and scored.

A task makes examples of the rows of a table, and an objective that collates, trains and scores them; see
``Task``.
"""

from zoext.tasks._answers import Answers, Classes
from zoext.tasks._chat import Chat
from zoext.tasks._choices import Choices
from zoext.tasks._encoding import Encoder
from zoext.tasks._generating import Completions
from zoext.tasks._generation import GeneratedAnswers, Generation
from zoext.tasks._kinds import CAUSAL, CLASSIFIER, ENCODER, MASKED, SEQ2SEQ, kind_of, language_kind_of
from zoext.tasks._labels import TRAINS, LabelWords, MultipleChoice
from zoext.tasks._metrics import exact_match, f1
from zoext.tasks._objective import Batch, NotAnsweringError, Objective, Scores
from zoext.tasks._presets import PRESETS, Preset, preset
from zoext.tasks._prompts import Cuts, Prompt
from zoext.tasks._rows import IGNORED, Example, Row
from zoext.tasks._task import Record, Task
from zoext.tasks._templates import RowError, Template
from zoext.tasks._texts import Classification, Completion, Text

__all__ = [
    "CAUSAL",
    "CLASSIFIER",
    "ENCODER",
    "IGNORED",
    "MASKED",
    "PRESETS",
    "SEQ2SEQ",
    "TRAINS",
    "Answers",
    "Batch",
    "Chat",
    "Choices",
    "Classes",
    "Classification",
    "Completion",
    "Completions",
    "Cuts",
    "Encoder",
    "Example",
    "GeneratedAnswers",
    "Generation",
    "LabelWords",
    "MultipleChoice",
    "NotAnsweringError",
    "Objective",
    "Preset",
    "Prompt",
    "Record",
    "Row",
    "RowError",
    "Scores",
    "Task",
    "Template",
    "Text",
    "exact_match",
    "f1",
    "kind_of",
    "language_kind_of",
    "preset",
]
