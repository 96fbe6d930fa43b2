"""Many answers at once on one event loop. Needs a network: zmqserve up echo --model demo --slots 64

python examples/fan_out.py [ENDPOINT]
"""

import asyncio
import sys

from zmqserve import AsyncClient, DeadlineExceeded


async def main() -> None:
    async with AsyncClient(sys.argv[1] if len(sys.argv) > 1 else None, retries=5) as client:
        model = (await client.models())[0].name

        async def words(number: int) -> int:
            async with client.generate(model, f"stream {number} of many", max_tokens=8) as stream:
                return sum([len(chunk.text.split()) async for chunk in stream])

        counts = await asyncio.gather(*[words(number) for number in range(200)])
        print(len(counts), "streams,", sum(counts), "words")

        prompts = [f"prompt {number}" for number in range(100)]
        async for result in client.map(model, prompts, concurrency=16, max_tokens=2):
            if result.index % 25 == 0:
                print(result.index, result.text)

        begun = asyncio.Event()

        async def read_without_end() -> None:
            async for _ in client.generate(model, "never read to its end", max_tokens=5_000_000):
                begun.set()

        task = asyncio.create_task(read_without_end())
        await begun.wait()
        task.cancel()  # the worker stops, too
        await asyncio.wait([task])
        print("cancelled:", task.cancelled())

        try:
            await client.generate(model, "too long", stream=False, max_tokens=5_000_000, timeout_s=0.2)
        except DeadlineExceeded as error:
            print("deadline:", error.code)


asyncio.run(main())
