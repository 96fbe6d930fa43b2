"""A client: the real Session on a simulated DEALER, and callers who ask, read, cancel and sometimes do not read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf

from zmqserve.call import Call
from zmqserve.errors import ZmqserveError
from zmqserve.session import Session

from .load import Habits, Plan, draw
from .network import Network
from .node import Node
from .oracle import Ask, Oracle
from .sockets import DealerSocket
from .world import World


class ClientNode(Node):
    """Asks for the models by chance while `asks` is set. `reads`: its callers take what has come."""

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        endpoints: Sequence[str],
        oracle: Oracle,
        *,
        habits: Habits,
        models: Sequence[str],
        buffer_bytes: int = 16 * 2**20,
        connect_timeout_s: float = 0.75,
        lag_s: float = 0.0,
    ) -> None:
        super().__init__(world, network, name, lag_s=lag_s)
        self.endpoints = list(endpoints)
        self.oracle = oracle
        self.habits = habits
        self.models = list(models)
        self.asks = True
        self.reads = True
        self.open: dict[Ask, None] = {}
        self._buffer_bytes = buffer_bytes
        self._connect_timeout_s = connect_timeout_s
        self._ready: list[Ask] = []
        self._next_s = inf

    def begin(self) -> None:
        self._dealer: DealerSocket | None = None
        self.session = Session(
            self,
            self.endpoints,
            name=self.name,
            connect_timeout_s=self._connect_timeout_s,
            buffer_bytes=self._buffer_bytes,
            random=self.random,
        )
        self._ready.clear()
        self._next_s = self.clock_s + self.random.expovariate(1 / self.habits.gap_s)

    def finish(self) -> None:
        if self._dealer is not None:
            self._dealer.close()
        for ask in self.open:
            self.oracle.forgotten(ask)
        self.open.clear()

    # --- Wire

    def connect(self, endpoint: str) -> None:
        if self._dealer is not None:
            self._dealer.close()
        self._dealer = DealerSocket(self.network, self, endpoint)

    def send(self, payload: bytes) -> bool:
        if self._dealer is None or not self._dealer.send(payload):
            return False
        self.oracle.asked(self._dealer, payload)
        return True

    # --- its life

    def turn(self, now: float) -> float:
        session = self.session
        dealer = self._dealer
        # All is read before the session may say that somebody is silent, or that the connection broke.
        while dealer is not None and dealer.inbox and dealer is self._dealer:
            payload = dealer.recv()[0]
            self.oracle.told(dealer, payload)
            session.on_message(now, payload)
        if dealer is not None and dealer is self._dealer and dealer.broke:
            dealer.broke = 0
            session.on_disconnected(now)
        if session.blocked:
            session.flush()
        session.tick(now)
        if now >= self._next_s:
            self._ask(now)
        while self._ready and self.reads:
            ready, self._ready = self._ready, []
            for ask in ready:
                self._read(ask)
        due_s = session.next_s()
        return min(self._next_s, inf if due_s is None else due_s)

    def _ask(self, now: float) -> None:
        self._next_s = now + self.random.expovariate(1 / self.habits.gap_s)
        if self.asks:
            burst = self.habits.burst if self.random.random() < self.habits.bursts else 1
            for _ in range(burst):
                self.ask(draw(self.random, self.habits, self.random.choice(self.models)))

    def ask(self, plan: Plan) -> Ask:
        """Open a request now."""
        ask = Ask(plan, self, self.world.now)
        self.oracle.opened(ask)
        self.open[ask] = None
        try:
            call = self.session.open(
                self.clock_s, plan.request, timeout_s=plan.timeout_s, collect=plan.collect, resume=plan.resume, retries=plan.retries
            )
        except ZmqserveError as error:
            self._end(ask, error)
            return ask
        ask.call = call
        if plan.cancel_after_s is not None:
            self.world.after(plan.cancel_after_s, self._cancel, ask, self.life)
        self._await(ask, call)
        self.stir_later()
        return ask

    def stir_later(self) -> None:
        """After something was done outside of a turn: see what is due."""
        self.world.after(0.0, self.stir)

    def read_again(self) -> None:
        """Its callers take what has come meanwhile."""
        self.reads = True
        self.stir_later()

    def _await(self, ask: Ask, call: Call) -> None:
        if call.ready:
            self._ready.append(ask)
        else:
            call.waiter = partial(self._woken_for, ask)

    def _woken_for(self, ask: Ask) -> None:
        self._ready.append(ask)

    def _cancel(self, ask: Ask, life: int) -> None:
        if self.life == life and self.alive and not self.paused and ask.call is not None and ask.call.end is None:
            ask.cancelled = True
            self.session.cancel(ask.call)
            self.stir()

    def _read(self, ask: Ask) -> None:
        call = ask.call
        if call is None or ask not in self.open:
            return
        # The end is set after the last chunk: look at it first.
        end = call.end
        while (chunk := call.take()) is not None:
            self.oracle.read(ask, chunk)
        if end is not None:
            self._end(ask, end)
        else:
            self._await(ask, call)

    def _end(self, ask: Ask, end: object) -> None:
        del self.open[ask]
        self.oracle.ended(ask, end)
