"""vLLM's own NIXL connector for engines that compute on CPU cores, with its threads taken out of the computation's way.

NIXL 1.5 keeps a thread that polls without pause, on the very core that the engine computes on, and vLLM 0.32 then moves
the computation to the last core of the machine, which is the same for every engine: two engines on one machine come to
a stand. Without that thread each step of either engine makes progress on what is under way, which is enough: an engine
that waits for blocks, or keeps some for another, steps every millisecond.

Named in `--kv-transfer-config` by `kv_connector_module_path`; on accelerators vLLM's own class serves.
"""

import functools
import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector


class NixlConnector(NixlPullConnector):
    """As vLLM's, without a polling thread; and the computing thread stays on the cores that it was bound to."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        if role is not KVConnectorRole.WORKER:
            super().__init__(vllm_config, role, kv_cache_config)
            return
        cores = os.sched_getaffinity(0)
        stock = base_worker.nixl_agent_config
        # vLLM has no setting for it, so NIXL's own configuration is given another default while the agent is made.
        base_worker.nixl_agent_config = functools.partial(stock, enable_prog_thread=False)
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        finally:
            base_worker.nixl_agent_config = stock
            os.sched_setaffinity(0, cores)
