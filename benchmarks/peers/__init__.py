"""Servers of the same checkpoint, written with common frameworks, to compare with `tdm-serve`.

Each runs as `python -m benchmarks.peers.NAME --port PORT --backend BACKEND` and has the same two
routes, so that one load generator can measure all of them:

- `GET /health`: answers 200 once the server can make pictures.
- `POST /v1/images/generations`: takes JSON with `prompt`, `seed` and `num_inference_steps`, and ignores
  other fields. Pictures have the checkpoint's first native size.

| peer | batches | batching by |
|---|---|---|
| `fastapi_lock` | no | |
| `litserve_batch` | yes | LitServe's `max_batch_size` and `batch_timeout` |
| `ray_batch` | yes | Ray Serve's `@serve.batch` |
| `bentoml_service` | yes | BentoML's adaptive batching |

Each peer has these backends: `stock-fp32` and `stock-bf16` are the diffusers pipeline, `openvino-genai` is OpenVINO
GenAI's, and `ours` is the backend of `tdm-serve` in a plain loop. With `ours`, only the scheduling differs from
`tdm-serve`.
"""
