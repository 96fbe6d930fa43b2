"""A pipeline of PUSH and PULL whose jobs `zmqserve bridge` runs. Needs a network: zmqserve up echo --model demo --slots 64

    python examples/pipeline.py [ENDPOINT]

Both ends know nothing of zmqserve: they send and receive JSON.
"""

import subprocess
import sys

import zmq

endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5570"
context = zmq.Context()
jobs, results = context.socket(zmq.PUSH), context.socket(zmq.PULL)
pull = f"tcp://127.0.0.1:{jobs.bind_to_random_port('tcp://127.0.0.1')}"
push = f"tcp://127.0.0.1:{results.bind_to_random_port('tcp://127.0.0.1')}"
# Without --timeout a job waits for ever until its model is served.
command = ["bridge", "--pull", pull, "--push", push, "--model", "demo", "--ordered", "--timeout", "10", "--controller", endpoint]
bridge = subprocess.Popen([sys.executable, "-m", "zmqserve", *command, "--log-level", "warning"])

for row in range(5):
    jobs.send_json({"id": row, "metadata": {"page": row // 2}, "prompt": f"row {row} of many", "params": {"max_tokens": 4}})
jobs.send_json({"id": "bad", "prompt": "x", "params": {"temperature": "warm"}})
for _ in range(6):
    result = results.recv_json()
    if "error" in result:
        print(result["id"], result["error"]["name"], result["error"]["message"])
    else:
        print(result["id"], result["metadata"], result["text"])

bridge.terminate()  # it finishes what it has taken, and pushes it
print("bridge:", bridge.wait(30))
jobs.close(linger=0)
results.close(linger=0)
context.term()
