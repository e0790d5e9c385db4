"""llama.cpp's own server in a process of its own: `python llama_cpp_server.py FOLDER PORT`.

Writes its address to FOLDER/url once the model is loaded. The package xllamacpp is that server, in C++,
without its command line.
"""

import sys
import time
from pathlib import Path

from rota.serving.engines.model_package import find_gguf

NUM_SLOTS = 2
MODEL = "smollm2-135m"


def main() -> None:
    import xllamacpp

    folder = Path(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = str(find_gguf())
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = int(sys.argv[2])
    params.n_parallel = NUM_SLOTS
    params.n_ctx = NUM_SLOTS * 4096
    params.endpoint_metrics = True
    params.warmup = False
    # More threads than there are free cores wait for each other in turns, and are slower than one by far.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    (folder / "url.part").write_text(server.listening_address)
    (folder / "url.part").rename(folder / "url")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
