from .base_of_student import BaseOfStudent
from .build import (
    PLACES,
    build_online_teacher,
    build_teacher,
    build_teacher_model,
    configured_teacher,
    fit_data,
    held_out_teacher,
    layer_problems,
    place_problems,
    problems,
)
from .cache.cached import CachedTeacher
from .compatibility import check_tokenizer, check_vocabularies
from .live import LiveTeacher
from .online import OnlineTeacher
from .other_tokenizer import log_aligned_share, pair_with_teacher
from .protocol import ConfiguredTeacher, Teacher, TeacherConfig, TeacherOfStudent
from .remote import RemoteTeacher, serve
from .several import Mixture, Routed

__all__ = [
    "PLACES",
    "BaseOfStudent",
    "CachedTeacher",
    "ConfiguredTeacher",
    "LiveTeacher",
    "Mixture",
    "OnlineTeacher",
    "RemoteTeacher",
    "Routed",
    "Teacher",
    "TeacherConfig",
    "TeacherOfStudent",
    "build_online_teacher",
    "build_teacher",
    "build_teacher_model",
    "check_tokenizer",
    "check_vocabularies",
    "configured_teacher",
    "fit_data",
    "held_out_teacher",
    "layer_problems",
    "log_aligned_share",
    "pair_with_teacher",
    "place_problems",
    "problems",
    "serve",
]
