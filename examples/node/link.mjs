// A worker's connection to one controller: registration, heartbeats, epochs, and who is given up when.
//
//   new Link(endpoint, worker) calls worker.onRequest(link, head, payload), worker.onCancel(link, head), worker.drain(graceMs),
//   worker.onAbandon(link) (what runs for this controller is nobody's any more) and worker.onEnd(link, error or null).
//   worker.offer() is its Ready, worker.load(link) its Load.

import { setTimeout as sleep } from 'node:timers/promises';
import { Dealer } from 'zeromq';
import {
  ControllerHead, KIND, Load, PROTOCOL, Ready, Refused, WorkerHead, WorkerWelcome, ZmqserveError, decodePart, encode, encodePart,
} from './protocol.mjs';
import { messages, onDisconnect } from './sockets.mjs';

const EMPTY = new Uint8Array(0);
const READY_MS = 1000; // a READY is repeated until WELCOME comes
const LOAD_MS = 20; // at most so often when others' load changes
const TICK_MS = 100;

export class Link {
  #socket = null;
  #sends = Promise.resolve();
  #held = []; // what the worker says while the controller is silent
  #gathered = new Map(); // client -> the chunks that this step made for it
  #controllerTtlMs = 3000;
  #mostBytes = Infinity; // a larger message would drop the connection
  #toldOthers = 0;
  #loadTimer = null;
  #timer;
  #lastTick = performance.now();
  #lastHeard = 0;
  #lastReady = 0;
  #lastLoad = 0;
  #readyEpoch = 0n; // what READY says: 0, or the number that came with REREGISTER
  #readyWaits = false;

  constructor(endpoint, worker) {
    Object.assign(this, { endpoint, worker, state: 'registering', epoch: 0n });
    this.#open();
    this.#timer = setInterval(() => this.#tick(), TICK_MS);
  }

  // ---- what the worker says -------------------------------------------------------------------------------------------------------

  /** The first chunk of a streamed answer: at once and alone. */
  first({ client, rid }, chunk) {
    this.#say({ kind: KIND.FIRST, client, rid }, encode('Chunk', chunk));
  }

  /** A later chunk: sent when the running step is over, with all others that it made for this client. */
  more({ client }, chunk) {
    if (!this.#gathered.has(client)) this.#gathered.set(client, []);
    this.#gathered.get(client).push(chunk);
    if (this.#gathered.size === 1) setImmediate(() => [...this.#gathered.keys()].forEach((c) => this.#flush(c)));
  }

  /** The end with an answer, after all chunks for this client. */
  done({ client, rid }, type, fields, outcome, usage) {
    this.#flush(client);
    const payload = encode(type, { rid, ...fields });
    if (payload.length > this.#mostBytes) {
      const why = `the answer has ${payload.length} bytes, and a message may have ${this.#mostBytes}`;
      this.failed({ client, rid }, new ZmqserveError(50001, why));
    } else {
      this.#say({ kind: KIND.DONE, client, rid, outcome, ...usage }, payload);
    }
  }

  failed({ client, rid }, error) {
    this.#flush(client);
    const { code, message, retryable = false, retry_after_ms = null, data = {} } = error;
    this.#say({ kind: KIND.FAILED, client, rid, code }, encode('Error', { rid, code, message, retryable, retry_after_ms, data }));
  }

  busy({ client, rid }) {
    this.#say({ kind: KIND.BUSY, client, rid });
  }

  draining() {
    this.#say({ kind: KIND.DRAINING });
  }

  /** The offer has changed (models, slots): told without touching what runs. */
  update() {
    if (this.state === 'registered') this.#ready(this.epoch);
  }

  /** Others' load has changed, perhaps: the controller is told soon, and not on each change. */
  loadChanged() {
    this.#loadTimer ??= setTimeout(() => {
      this.#loadTimer = null;
      if (this.state === 'registered' && this.#others() !== this.#toldOthers) this.#load();
    }, LOAD_MS);
  }

  /** Leaves the controller. BYE has to reach the wire, so the socket lingers, unlike at all other times. */
  async leave(error = null) {
    if (this.state === 'ended') return;
    const said = this.state === 'registered' ? this.#write({ kind: KIND.BYE }) : null;
    this.state = 'ended';
    clearInterval(this.#timer);
    clearTimeout(this.#loadTimer);
    await Promise.race([said, sleep(1000, undefined, { ref: false })]);
    this.#close(1000);
    this.worker.onEnd(this, error);
  }

  // ---- what the controller says ---------------------------------------------------------------------------------------------------

  async #receive(socket) {
    for await (const frames of messages(socket)) {
      if (socket !== this.#socket || this.state === 'ended') return;
      try {
        if (frames.length === 2) this.#take(decodePart(ControllerHead, frames[0]), frames[1]);
      } catch (error) {
        console.error(`${this.endpoint}: a frame was dropped: ${error.message}`);
      }
    }
  }

  #take(head, payload) {
    this.#lastHeard = performance.now();
    switch (head.kind) {
      case KIND.WELCOME: return this.#welcome(head.epoch, decodePart(WorkerWelcome, payload));
      case KIND.REREGISTER: return this.#register(head.epoch);
      case KIND.REFUSED: return this.#refused(decodePart(Refused, payload));
    }
    if (this.state !== 'registered' || head.epoch !== this.epoch) return undefined; // of a former life of either side
    this.#held.splice(0).forEach(([told, bytes]) => this.#write(told, bytes)); // it lives, and we are still its worker
    switch (head.kind) {
      case KIND.REQUEST: return this.worker.onRequest(this, head, payload);
      case KIND.CANCEL: return this.worker.onCancel(this, head);
      case KIND.DRAIN: return this.worker.drain(head.deadline_ms ?? undefined);
      default: return undefined; // BEAT, or a kind of a newer controller
    }
  }

  #welcome(epoch, { protocol, controller, ttl_ms, message_bytes }) {
    if (protocol !== PROTOCOL) {
      this.leave(new ZmqserveError(40003, `the controller speaks protocol ${protocol}, this worker ${PROTOCOL}`));
      return;
    }
    if (epoch !== this.epoch) this.#abandon();
    if (this.state !== 'registered') console.error(`${this.endpoint}: registered with controller ${controller}`);
    this.state = 'registered';
    this.epoch = epoch;
    this.#controllerTtlMs = ttl_ms;
    this.#mostBytes = message_bytes || Infinity;
    this.#load();
  }

  #refused({ code, why, retry_after_ms }) {
    this.#abandon();
    if (retry_after_ms === null) this.leave(new ZmqserveError(code, why));
    else this.#lastReady = performance.now() + retry_after_ms - READY_MS; // the next READY goes out then
  }

  // ---- registration and liveness ------------------------------------------------------------------------------------------------------

  #open() {
    // immediate: no heartbeats pile up for a controller that is not there. No high-water mark: what one message may not overtake or lose
    // is better kept by ZeroMQ; it is bounded because a silent controller is told nothing.
    const socket = new Dealer({ immediate: true, linger: 0, reconnectInterval: 100, reconnectMaxInterval: 1000, sendHighWaterMark: 0 });
    this.#socket = socket;
    onDisconnect(socket, () => {
      // The controller has given up what it held for this connection; the next one is a stranger's to it.
      if (socket === this.#socket && this.state !== 'ended') this.#register(0n);
    });
    socket.connect(this.endpoint);
    this.#lastHeard = performance.now();
    this.#receive(socket);
    this.#register(0n);
  }

  #close(lingerMs) {
    const socket = this.#socket;
    this.#socket = null;
    socket.linger = lingerMs;
    socket.close();
  }

  #register(epoch) {
    this.#abandon();
    if (this.state === 'ended') return; // one that drains leaves instead
    this.#readyEpoch = epoch;
    this.#ready(epoch);
  }

  #ready(epoch) {
    this.#lastReady = performance.now();
    if (this.#readyWaits) return; // for the connection: one is enough
    this.#readyWaits = true;
    this.#write({ kind: KIND.READY, epoch }, encodePart(Ready, { protocol: PROTOCOL, ...this.worker.offer() }))
      .then(() => { this.#readyWaits = false; });
  }

  // What runs for this controller has been given to somebody else, or ended: it stops in silence.
  #abandon() {
    this.state = 'registering';
    this.epoch = 0n;
    this.#held = [];
    this.#gathered.clear();
    this.worker.onAbandon(this);
  }

  #load() {
    this.#lastLoad = performance.now();
    this.#toldOthers = this.#others();
    this.#write({ kind: KIND.LOAD }, encodePart(Load, this.worker.load(this)));
  }

  #others() {
    const { running, waiting, yours } = this.worker.load(this);
    return running + waiting - yours;
  }

  #tick() {
    const now = performance.now();
    // Stopped for a while (a signal, a suspended machine): it is not the controller that was silent.
    if (now - this.#lastTick > 10 * TICK_MS) this.#lastHeard = now;
    this.#lastTick = now;
    if (now - this.#lastHeard > 2 * this.#controllerTtlMs) {
      this.#close(0);
      this.#open();
      this.#lastHeard = now + (Math.random() * 2000 + 2000) - 2 * this.#controllerTtlMs; // the next fresh socket in 2-4 s
    } else if (this.state === 'registered') {
      if (now - this.#lastLoad >= this.worker.ttlMs / 3) this.#load();
    } else if (now - this.#lastReady >= READY_MS) {
      this.#ready(this.#readyEpoch);
    }
  }

  // ---- sending ----------------------------------------------------------------------------------------------------------------------

  #flush(client) {
    const chunks = this.#gathered.get(client);
    if (!chunks) return;
    this.#gathered.delete(client);
    const payload = chunks.length === 1 ? encode('Chunk', chunks[0]) : encode('Chunks', { chunks });
    this.#say({ kind: KIND.MORE, client }, payload);
  }

  // What is said of requests: kept while the controller is silent, void when this worker is not registered.
  #say(head, payload) {
    if (this.state !== 'registered') return;
    const silent = performance.now() - this.#lastHeard > this.#controllerTtlMs;
    if (silent || this.#held.length) this.#held.push([head, payload]);
    else this.#write(head, payload);
  }

  // One send at a time, in order; what has not left when the connection or the epoch is gone never leaves.
  #write(head, payload = EMPTY) {
    const frames = [encodePart(WorkerHead, { epoch: this.epoch, ...head }), payload]; // MORE's head comes out in its canonical form
    const [socket, epoch] = [this.#socket, this.epoch];
    this.#sends = this.#sends
      .then(() => socket.closed || epoch !== this.epoch || socket.send(frames))
      .catch(() => {}); // it was closed meanwhile
    return this.#sends;
  }

}
