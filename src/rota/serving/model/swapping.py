"""Where and how preempted requests are kept in host memory, as a stack says."""

import msgspec


class SwapRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Host memory of an instance to swap to, and the link to it. Simulated engines only.

    The defaults are a Llama-3.1-8B on PCIe 4 x16: an assumption, not a measurement."""

    host_blocks: int
    """KV blocks that fit into host memory."""
    block_group: int = 60
    """Blocks in a row that travel together; 1 is one by one, as vLLM swapped. FastSwitch begins with 60."""
    reuse: bool = True
    """Whether the copy of a request that went on stays valid, so that only what it computed since is copied out."""
    asynchronous: bool = True
    """Whether steps run while copies travel; without, each step waits for all of them."""
    kv_bytes_per_token: int = 131_072
    """2 (keys and values) x 32 layers x 8 heads x 128 x 2 bytes."""
    group_latency_us: float = 320.0
    """For each group, beside its bytes: keys and values of 32 layers, at 5 us a copy."""
    gigabytes_per_second: float = 24.0
    """Out and in apart."""

    def __post_init__(self) -> None:
        if self.host_blocks < 1 or self.block_group < 1:
            raise ValueError("host_blocks and block_group must be at least 1")
        if self.group_latency_us < 0 or not self.gigabytes_per_second > 0:
            raise ValueError("group_latency_us must not be negative, and gigabytes_per_second above 0")
