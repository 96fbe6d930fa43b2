"""A client in a loop that a program has already, here beside a socket of its own. Needs: zmqserve up echo --model demo --slots 64

python examples/poll_loop.py [ENDPOINT]
"""

import sys
import threading

import zmq

from zmqserve import PolledClient

context = zmq.Context()
lines = context.socket(zmq.PULL)
lines.bind("inproc://lines")


def speak() -> None:
    """What else the program listens to."""
    mouth = context.socket(zmq.PUSH)
    mouth.connect("inproc://lines")
    for line in ("one two three", "four five", ""):
        mouth.send_string(line)
    mouth.close()


threading.Thread(target=speak).start()
poller = zmq.Poller()
with PolledClient(sys.argv[1] if len(sys.argv) > 1 else None) as client:
    poller.register(lines, zmq.POLLIN)
    poller.register(client, zmq.POLLIN)
    asking = client.models()
    streams = {}
    waiting = []
    model, last = "", False
    while not (last and model and not streams and not waiting):
        events = dict(poller.poll(client.wait_ms()))
        if lines in events:
            line = lines.recv_string()
            if line:
                waiting.append(line)
            else:
                last = True
        for asked in client.process():
            if asked is asking:
                model = asking.result()[0].name
            elif asked in streams:
                streams[asked] += "".join(chunk.text for chunk in asked.take())
                if asked.done:
                    print(streams.pop(asked))
        while model and waiting:
            streams[client.generate(model, waiting.pop(0), max_tokens=4)] = ""
lines.close()
context.term()
