"""The comparisons that matter, from what was measured. One whose peer is missing is missing too."""

from __future__ import annotations

import statistics

from .results import Results

_RATIOS = {
    # name: workload and peer above, workload and peer below
    "relay_token_vs_proxy": ("token", "zmqserve", "token", "zmq.proxy"),
    "relay_token_vs_nats_py": ("token", "zmqserve", "token", "nats-py"),
    "relay_token_vs_nats_raw": ("token", "zmqserve", "token", "nats raw"),
    "relay_token_decoded_vs_nats_py": ("token_decoded", "zmqserve", "token_decoded", "nats-py"),
    "relay_token_decoded_vs_nats_raw": ("token_decoded", "zmqserve", "token_decoded", "nats raw"),
    "relay_step_vs_proxy": ("step", "zmqserve", "step", "zmq.proxy"),
    "sdk_token_vs_fastapi": ("token_decoded", "zmqserve sdk", "token_decoded", "fastapi sse"),
    "sdk_step_vs_fastapi": ("step_decoded", "zmqserve sdk", "token_decoded", "fastapi sse"),
    "sdk_token_vs_grpc": ("token_decoded", "zmqserve sdk", "token_decoded", "grpc aio"),
    "sdk_token_vs_fastchat": ("token_decoded", "zmqserve sdk", "token_decoded", "fastchat"),
    "requests_vs_proxy": ("requests", "zmqserve", "requests", "zmq.proxy"),
    "requests_vs_nats_py": ("requests", "zmqserve", "requests", "nats-py"),
    "requests_vs_nats_raw": ("requests", "zmqserve", "requests", "nats raw"),
    "requests_vs_fastchat": ("requests", "zmqserve", "requests", "fastchat"),
    "sdk_requests_vs_fastchat": ("requests", "zmqserve sdk", "requests", "fastchat"),
    "sdk_requests_vs_fastapi": ("requests", "zmqserve sdk", "requests", "fastapi sse"),
    "embed_vs_json_http": ("embed", "zmqserve sdk", "embed", "fastapi sse"),
    "embed_vs_fast_json_http": ("embed", "zmqserve sdk", "embed_fast_json", "fastapi sse"),
    "embed_vs_fastchat": ("embed", "zmqserve sdk", "embed", "fastchat"),
}
_ADDED = ("zmq.proxy", "zmqserve", "nats raw", "nats-py")


def ratios(results: Results) -> dict[str, float]:
    """By name. `*_added_p99_ms_*`: a broker's delay over no broker's, block by block, the median of the differences."""
    found: dict[str, float] = {}
    for name, (workload, peer, other, than) in _RATIOS.items():
        above, below = results.median(workload, peer), results.median(other, than)
        if above is not None and below:
            found[name] = above / below
    for workload in ("paced_step", "paced_token"):
        for peer in _ADDED:
            both = list(zip(results.blocks(workload, peer), results.blocks(workload, "direct"), strict=False))
            if both:
                name = peer.replace(" ", "_").replace("-", "_").replace(".", "_")
                found[f"{workload}_added_p50_ms_{name}"] = statistics.median(one.value - none.value for one, none in both)
                found[f"{workload}_added_p99_ms_{name}"] = statistics.median(one.p99_ms - none.p99_ms for one, none in both)
    return found
