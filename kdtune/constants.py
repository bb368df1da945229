"""Numbers and names shared by every layer."""

# The label of a position that is not trained on (the value torch.nn.functional.cross_entropy ignores by default).
IGNORE_INDEX = -100

# The mesh dimension over which matrices are cut (tensor parallelism).
TP_DIM = "tp"
