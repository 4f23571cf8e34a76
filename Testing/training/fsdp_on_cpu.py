"""Pretraining with FSDP on a CPU, for tests: accelerate shards on GPUs only, torch on both."""

from __future__ import annotations

from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from training.pretrain import main

_begin = state.AcceleratorState.__init__


def _begin_sharded(self: state.AcceleratorState, *args: Any, **options: Any) -> None:
    _begin(self, *args, **options)
    plugin = options.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
    if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _begin_sharded  # type: ignore[method-assign]
    main()
