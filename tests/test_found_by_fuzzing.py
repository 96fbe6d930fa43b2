"""What `python -m bench fuzz` has found, each as small as it could be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.broker import chunk
from tests.fakes.rig import Rig, piece
from tests.fakes.session import TWO, World, ended
from tests.test_link import Host
from zmqserve import messages as m
from zmqserve.config import load_config
from zmqserve.errors import InvalidParameter, Overloaded
from zmqserve.params import SamplingParams


def test_an_answer_of_two_choices_that_moved_once_and_then_is_turned_down_in_its_middle_ends() -> None:
    """It cannot be resumed, so what passes is of no use to it. The session asked to resume it, and raised a ValueError."""
    world = World(*TWO)
    call = world.open(params=SamplingParams(n=2))
    world.welcome("c1")
    world.disconnect()
    world.welcome("c2")
    world.hear(chunk(call.rid, 0), m.Error(call.rid, Overloaded.code, "the queue is full", True, 1))
    world.pass_s(1.0)
    world.hear(m.Welcome(m.PROTOCOL, "c2", m.Limits()))
    assert isinstance(ended(call), Overloaded)


@pytest.mark.parametrize("value", ["[" * 3000, "9" * 5000])
def test_a_settings_file_that_no_parser_likes_is_an_error_that_names_it(tmp_path: Path, value: str) -> None:
    path = tmp_path / "controller.toml"
    path.write_text(f"seed = {value}")
    with pytest.raises(InvalidParameter, match=r"controller\.toml"):
        load_config(path)


@pytest.mark.parametrize("cut", ["LOAD", "FIRST", "MORE"])
def test_a_message_cut_short_takes_no_part_of_the_next_one_along(cut: str) -> None:
    """Its head is that of a worker's message, and the routing id that follows was taken for its payload: what another worker said was
    lost, and all streams of one step with it."""
    rig = Rig()
    try:
        client = rig.connect("clients")
        good = rig.worker("good", slots=1)
        number = rig.flight(client, good)
        bad = rig.worker("bad", slots=1)
        head = m.WorkerHead({"LOAD": m.LOAD, "FIRST": m.FIRST, "MORE": m.MORE}[cut], bad.epoch, number)
        payloads = [piece(b"%d" % count) for count in range(40)]
        for payload in payloads:  # they are read in turns: a cut one, a whole one
            bad.send(m.encode(head))
            good.more(number, payload)
        rig.pump()
        assert client.got() == [[payload] for payload in payloads]
    finally:
        rig.close()


def test_a_refusal_for_thousands_of_years_is_one_for_a_minute() -> None:
    """A worker that believed it never came back by itself."""
    host = Host()
    refused = m.Refused(40000, "the name is taken", 2**53)
    host.link.received(host.now, m.encode(m.ControllerHead(m.REFUSED, 0)), m.encode(refused))
    host.sent.clear()
    assert host.link.tick(host.now) <= host.now + 60.0
    host.link.tick(host.now + 61.0)
    assert [head.kind for head in host.sent] == [m.READY]
