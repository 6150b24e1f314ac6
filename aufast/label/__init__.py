"""Images and videos in, AU tables, pictures and reports out."""

from aufast.label.config import FINE, FORMATS, STATUSES, InputError, LabelConfig
from aufast.label.labeler import Labeler, Outcome
from aufast.label.run import Summary, label_files

__all__ = [
    "FINE",
    "FORMATS",
    "STATUSES",
    "InputError",
    "LabelConfig",
    "Labeler",
    "Outcome",
    "Summary",
    "label_files",
]
