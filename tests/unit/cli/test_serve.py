"""What `rota serve` does when it is ready."""

import gc
from types import SimpleNamespace
from typing import Any

from rota.cli.serve import _ready


def test_what_a_router_starts_with_is_kept_out_of_later_collections_of_garbage() -> None:
    router: Any = SimpleNamespace(url="http://127.0.0.1:1", engines=[], cluster=SimpleNamespace(statuses={}))
    gc.unfreeze()
    try:
        _ready(router, json=False)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
