"""Teachers: `teacher(batch)` gives the signal that a loss compares the student with."""

from kdtune.teachers.build import build_teacher
from kdtune.teachers.compatibility import check_tokenizer, check_vocabularies
from kdtune.teachers.online import OnlineTeacher
from kdtune.teachers.remote import RemoteModel, serve

__all__ = ["OnlineTeacher", "RemoteModel", "build_teacher", "check_tokenizer", "check_vocabularies", "serve"]
