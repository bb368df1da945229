from .buffer import Buffer
from .policy import DistiLLMSchedule, Pairs, Policy, Share
from .policy_gradient import PolicyGradient
from .record import Prompt, Rollout, check_prompts, prompts_of_dataset, random_seed
from .rollouts import Rollouts
from .vllm_writer import VLLMWriter
from .watch import Guards
from .written import answer_rows, answers_header, answers_summary, start_answers

__all__ = [
    "Buffer",
    "DistiLLMSchedule",
    "Guards",
    "Pairs",
    "Policy",
    "PolicyGradient",
    "Prompt",
    "Rollout",
    "Rollouts",
    "Share",
    "VLLMWriter",
    "answer_rows",
    "answers_header",
    "answers_summary",
    "check_prompts",
    "prompts_of_dataset",
    "random_seed",
    "start_answers",
]
