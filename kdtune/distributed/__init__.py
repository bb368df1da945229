"""The processes of a run: their world, collective operations, sharded tensors, and the channel to a disaggregated teacher."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
