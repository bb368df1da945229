"""Teachers: `teacher(batch)` gives the signal that a loss compares the student with."""

from kdtune.teachers.compatibility import check_tokenizer, check_vocabularies
from kdtune.teachers.online import OnlineTeacher

__all__ = ["OnlineTeacher", "check_tokenizer", "check_vocabularies"]
