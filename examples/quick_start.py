"""The first things to ask. Needs a network: zmqserve up echo --model demo --slots 64

python examples/quick_start.py [ENDPOINT]
"""

import sys

from zmqserve import Client, UnknownModel

with Client(sys.argv[1] if len(sys.argv) > 1 else None, timeout_s=30) as client:
    model = client.models()[0].name

    for chunk in client.generate(model, "Hello from a stream", max_tokens=4):
        print(chunk.text, end="", flush=True)
    print()

    reply = client.generate(model, "a whole answer", stream=False, max_tokens=3)
    print(reply.text, "|", reply.finish_reason, "|", reply.usage.completion_tokens, "tokens by", reply.timings.worker)

    conversation = [{"role": "user", "content": "Hi there"}]
    print(client.chat(model, conversation, stream=False, max_tokens=8).text)
    print(client.count_tokens(model, conversation), "tokens in the conversation")

    try:
        client.generate("no-such-model", "x", stream=False)
    except UnknownModel as error:
        print(error)
