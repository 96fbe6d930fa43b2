"""What type checkers must flag. Each line says which of their rules does: a rule that does not is an error in itself."""

from __future__ import annotations

from zmqserve import AsyncClient, Client, Completion, PolledClient, SamplingParams, Stream

client = Client("tcp://127.0.0.1:5570")
later = AsyncClient()
polled = PolledClient()

client.generate("m", "x", max_tokens="5")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
client.generate("m", "x", max_token=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
client.generate("m")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
client.generate("m", 5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
client.chat("m", "Hi")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
client.embed("m", ["a"], temperature=0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
client.map("m", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Client(timeout=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SamplingParams(temperatur=0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

whole: Completion = client.generate("m", "x")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
stream: Stream = client.generate("m", "x", stream=False)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
for _ in later.generate("m", "x"):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType]
    pass
_ = later.generate("m", "x", stream=False).text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
_ = polled.generate("m", "x", stream=False).text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
