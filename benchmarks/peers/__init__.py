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
