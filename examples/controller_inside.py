"""Controller, worker and client in one process, over inproc: nothing is bound that others could reach.

python examples/controller_inside.py
"""

import zmq

from zmqserve import Client, Controller, WorkerConfig
from zmqserve.backends.echo import EchoWorker

context = zmq.Context()
controller = Controller(clients=["inproc://clients"], workers=["inproc://workers"], context=context)
controller.start()
worker = EchoWorker(WorkerConfig(model="demo", controllers=("inproc://workers",), context=context))
with worker, Client("inproc://clients", context=context) as client:
    worker.wait_ready(timeout_s=10)
    print(client.generate("demo", "all in one process", stream=False, max_tokens=4).text)
    print([worker.name == each.name for each in client.status().workers])
controller.stop()
context.term()
print("stopped")
