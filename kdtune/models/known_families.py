"""The model families that kdtune knows. A run imports this list, and their files, once it looks for a model's family."""

from kdtune.models.architecture import Family
from kdtune.models.gemma import GEMMA2, GEMMA3
from kdtune.models.granite import GRANITE
from kdtune.models.llama import LLAMA
from kdtune.models.mistral import MINISTRAL, MISTRAL
from kdtune.models.olmo import OLMO2, OLMO3
from kdtune.models.phi import PHI3
from kdtune.models.qwen import QWEN2, QWEN3
from kdtune.models.smollm3 import SMOLLM3

# Of those whose GGUF files have one architecture, the first reads them.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    OLMO3,
    SMOLLM3,
    GRANITE,
    PHI3,
    GEMMA2,
    GEMMA3,
)
