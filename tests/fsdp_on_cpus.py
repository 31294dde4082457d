"""
`pertstate train` with FSDP2 over gloo. accelerate has FSDP for accelerators alone and leaves it out on CPUs; here its state is told
that it was asked for. All else is what runs on GPUs.
"""

import sys

from accelerate import state
from accelerate.utils import DistributedType


_made = state.AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _with_fsdp
    from pertstate.cli import main

    raise SystemExit(main(["train", *sys.argv[1:]]))
