"""Servers that people write around the same checkpoint with what there is: what `tdm-serve` is compared with.

Each runs as `python -m benchmarks.peers.NAME --port PORT --backend BACKEND` and answers the same two
routes, so that one load generator measures all:

- `GET /health`: 200 once pictures can be made.
- `POST /v1/images/generations`: JSON with `prompt`, `seed` and `num_inference_steps`; other fields
  change nothing. Pictures have the checkpoint's first native size.

| peer | batches | batching is |
|---|---|---|
| `fastapi_lock` | no | |
| `litserve_batch` | yes | LitServe's `max_batch_size` and `batch_timeout` |
| `ray_batch` | yes | Ray Serve's `@serve.batch` |
| `bentoml_service` | yes | BentoML's adaptive batching |

Each runs each of three backends: `stock-fp32` and `stock-bf16` are the diffusers pipeline, `ours` is what
`tdm-serve` runs, in a plain loop. With `ours` the difference to `tdm-serve` is scheduling alone.
"""

import os

# Read when torch is first imported, here or in a process that a peer starts. A torch operation's threads wait
# for each other spinning, and beside a server's other processes and its clients on the same cores one of them
# may wait for a core: stock fp32, 4 steps, took 0.8 to 1.4 s on a busy machine so, and 0.11 to 0.15 s passively.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
