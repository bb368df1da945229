"""Teachers: `teacher(batch)` returns the signal that a loss compares the student with."""

from kdtune.teachers.build import build_teacher, build_teacher_model, problems
from kdtune.teachers.compatibility import check_tokenizer, check_vocabularies
from kdtune.teachers.online import OnlineTeacher
from kdtune.teachers.protocol import Teacher
from kdtune.teachers.remote import RemoteTeacher, serve

__all__ = [
    "OnlineTeacher",
    "RemoteTeacher",
    "Teacher",
    "build_teacher",
    "build_teacher_model",
    "check_tokenizer",
    "check_vocabularies",
    "problems",
    "serve",
]
