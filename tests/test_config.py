"""A controller's settings, from a file and from keywords."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmqserve.config import CLIENT_ENDPOINT, WORKER_ENDPOINT, ControllerConfig, load_config
from zmqserve.errors import InvalidParameter


def test_the_defaults_are_loopback_endpoints_and_shortest_queue() -> None:
    config = load_config(None)
    assert (config.clients, config.workers, config.dispatch, config.ttl_s) == ([CLIENT_ENDPOINT], [WORKER_ENDPOINT], "shortest_queue", 3.0)


def test_two_configs_do_not_share_their_lists() -> None:
    assert ControllerConfig().clients is not ControllerConfig().clients


def test_a_file_sets_and_an_override_beats_it(tmp_path: Path) -> None:
    path = tmp_path / "controller.toml"
    path.write_text('clients = ["ipc:///run/z.ipc"]\nttl_s = 5\nqueue_requests = 10\n')
    config = load_config(path, queue_requests=20, dispatch=None)
    assert (config.clients, config.ttl_s, config.queue_requests, config.dispatch) == (["ipc:///run/z.ipc"], 5.0, 20, "shortest_queue")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttl_s = 0", "ttl_s"),
        ("ttl_s = -1", "ttl_s"),
        ("ttl_s = nan", "ttl_s"),
        ("ttl_s = inf", "ttl_s"),
        ("ttl_s = 'long'", "ttl_s"),
        ("queue_requests = 0", "queue_requests"),
        ("queue_request = 5", "queue_request"),
        ("dispatch = 'fastest'", "lottery, shortest_queue; got 'fastest'"),
        ("clients = []", "clients needs at least one"),
        ("workers = 'tcp://127.0.0.1:1'", "workers"),
        ("this is not toml", "is not TOML"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "controller.toml"
    path.write_text(text)
    with pytest.raises(InvalidParameter) as caught:
        load_config(path)
    assert said in caught.value.message
    assert "controller.toml" in caught.value.message
    assert caught.value.parameter


def test_one_endpoint_is_not_for_both_sides() -> None:
    with pytest.raises(InvalidParameter, match=r"both have tcp://127\.0\.0\.1:5570"):
        ControllerConfig(clients=["tcp://127.0.0.1:5570"], workers=["tcp://127.0.0.1:5571", "tcp://127.0.0.1:5570"])
    for chosen in ("tcp://127.0.0.1:*", "tcp://127.0.0.1:0"):
        ControllerConfig(clients=[chosen], workers=[chosen])


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(InvalidParameter, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidParameter, match="is not TOML"):
        load_config(tmp_path / "binary")
