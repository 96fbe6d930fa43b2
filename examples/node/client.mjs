// A client of one zmqserve controller: streams with cancel, embeddings, typed errors, and it notices when the controller is gone.
//
//   const client = new Client('tcp://127.0.0.1:5570');
//   for await (const { text } of client.generate({ model: 'echo', prompt: 'a b c' })) process.stdout.write(text);
//   await client.close();
//
// Requests are given with the names of PROTOCOL.md: { model, prompt | messages | token_ids, params, deadline_ms, ... }.

import { randomBytes } from 'node:crypto';
import { Dealer } from 'zeromq';
import { PROTOCOL, ZmqserveError, bytesToIds, bytesToVectors, decode, encode, idsToBytes } from './protocol.mjs';
import { messages, onDisconnect } from './sockets.mjs';

const PING_MS = 1000;

export class Client {
  #socket = null;
  #sends = Promise.resolve();
  #open = new Map(); // rid -> Call, of the requests that have no end yet
  #lastHeard = 0;
  #lastPing = -Infinity;
  #lastTick = 0;
  #controllerTtlMs = 3000;
  #wasHeard = false;
  #timer = null;

  /** `ttlMs`: the controller gives this client up, and cancels what it asked, after so much silence. */
  constructor(endpoint, { ttlMs = 3000, name = 'node' } = {}) {
    Object.assign(this, { endpoint, ttlMs, name });
  }

  /** A stream: `for await` gives chunks ({ text, token_ids, index, seq, logprobs }), `await stream.done` the end. Leaving it cancels. */
  generate({ signal, ...request }) {
    return this.#start('Generate', { ...request, stream: true }, new Stream(this), signal);
  }

  /** The whole answer at once: { choices: [{ text, token_ids, finish_reason, logprobs }], usage, timings }. */
  async ask({ signal, ...request }) {
    const reply = await this.#start('Generate', { ...request, stream: false }, new Call(this), signal).done;
    for (const choice of reply.choices) choice.token_ids = bytesToIds(choice.token_ids);
    return reply;
  }

  /** One Float32Array per text: { vectors, usage, timings }. */
  async embed({ signal, ...request }) {
    const { dtype, shape, data, usage, timings } = await this.#start('Embed', request, new Call(this), signal).done;
    if (dtype !== 'float32') throw new ZmqserveError(40001, `vectors of ${dtype}: only float32 is known`);
    return { vectors: bytesToVectors(shape, data), usage, timings };
  }

  /** { count, context_length } of a prompt or of messages. */
  async countTokens({ signal, ...request }) {
    return this.#start('CountTokens', request, new Call(this), signal).done;
  }

  /** The card of a model, from a worker that serves it. */
  async modelDetails({ signal, ...request }) {
    return (await this.#start('ModelDetails', request, new Call(this), signal).done).card;
  }

  /** What is served: [{ card, state, workers, running, waiting, slots, ... }]. */
  async models() {
    return (await this.#start('ListModels', {}, new Call(this)).done).models;
  }

  /** The controller's state, its workers' included. */
  async status() {
    return (await this.#start('Status', {}, new Call(this)).done).status;
  }

  /** Cancels what is open; what waits for it is rejected. */
  async close() {
    for (const call of [...this.#open.values()]) {
      this.cancel(call);
      this.#end(call, new ZmqserveError(50400, 'the client was closed'));
    }
    await this.#sends;
    this.#disconnect(500);
  }

  /** Asks to stop a request; its end comes all the same, once. Harmless when it has ended. */
  cancel(call) {
    if (this.#open.has(call.rid)) this.#send('Cancel', { rid: call.rid });
  }

  #start(type, request, call, signal) {
    if (request.token_ids) request = { ...request, token_ids: idsToBytes(request.token_ids) };
    const bytes = encode(type, { ...request, rid: call.rid }); // what is missing in the request is thrown here
    const now = performance.now();
    if (!this.#socket) this.#connect();
    if (this.#open.size === 0) {
      this.#lastHeard = now; // nobody was asked anything, so nobody owed a sign of life
      this.#lastTick = now;
      this.#timer = setInterval(() => this.#tick(), PING_MS / 4);
    }
    this.#open.set(call.rid, call);
    this.#sendBytes(bytes);
    if (now - this.#lastPing >= PING_MS) this.#ping(now);
    const abort = () => this.cancel(call);
    if (signal?.aborted) abort();
    signal?.addEventListener('abort', abort);
    call.done.finally(() => signal?.removeEventListener('abort', abort)).catch(() => {});
    return call;
  }

  #connect() {
    const socket = new Dealer({ linger: 0, reconnectInterval: 100, reconnectMaxInterval: 1000 });
    this.#socket = socket;
    this.#sends = Promise.resolve();
    this.#wasHeard = false;
    // The next connection is a stranger's to the controller: it has given up what this one asked.
    onDisconnect(socket, () => socket === this.#socket && this.#lose(lost('the connection broke')));
    socket.connect(this.endpoint);
    this.#receive(socket);
    this.#send('Hello', { protocol: PROTOCOL, client: this.name });
  }

  #disconnect(lingerMs) {
    if (!this.#socket) return;
    this.#socket.linger = lingerMs;
    this.#socket.close();
    this.#socket = null;
  }

  // Everything open here ends; the next request begins with a new connection.
  #lose(error) {
    this.#disconnect(0);
    for (const call of [...this.#open.values()]) this.#end(call, error);
  }

  #send(type, fields) {
    this.#sendBytes(encode(type, fields));
  }

  // zeromq.js takes one send at a time.
  #sendBytes(bytes) {
    const socket = this.#socket;
    this.#sends = this.#sends.then(() => socket.closed || socket.send(bytes)).catch(() => {}); // it was closed meanwhile
  }

  #ping(now) {
    this.#lastPing = now;
    this.#send('Ping', { ttl_ms: this.ttlMs, rids: [...this.#open.keys()] });
  }

  #tick() {
    const now = performance.now();
    // A program that was stopped for a while has read nothing either, and may not blame the controller.
    if (now - this.#lastTick > PING_MS) this.#lastHeard = now;
    this.#lastTick = now;
    if (now - this.#lastHeard > this.#controllerTtlMs) {
      const [code, what] = this.#wasHeard ? [50402, 'is silent now'] : [50401, 'does not answer'];
      this.#lose(new ZmqserveError(code, `the controller at ${this.endpoint} ${what}`, { retryable: true }));
    } else if (now - this.#lastPing >= PING_MS) {
      this.#ping(now);
    }
  }

  async #receive(socket) {
    for await (const frames of messages(socket)) {
      if (socket !== this.#socket) return;
      this.#lastHeard = performance.now();
      this.#wasHeard = true;
      try {
        this.#take(decode(frames.at(-1)));
      } catch (error) {
        this.#lose(error); // a controller that does not speak this protocol
      }
    }
  }

  #take(message) {
    switch (message.type) {
      case 'Welcome':
        this.#controllerTtlMs = message.limits.ttl_ms || this.#controllerTtlMs;
        break;
      case 'Pong':
        for (const rid of message.unknown) {
          if (this.#open.has(rid)) this.#end(this.#open.get(rid), lost('the controller does not have this request any more'));
        }
        break;
      case 'GoAway':
        break; // what is open ends with Error 50302; what is asked from now on too, or with the connection
      case 'Chunk':
        this.#chunk(message);
        break;
      case 'Chunks':
        message.chunks.forEach((chunk) => this.#chunk(chunk));
        break;
      case 'Error':
        this.#error(message);
        break;
      case null:
        break;
      default: {
        const call = this.#open.get(message.rid);
        if (message.type === 'Done' && call) this.#done(call, message);
        else if (call) this.#end(call, null, message);
      }
    }
  }

  #chunk(chunk) {
    const call = this.#open.get(chunk.rid);
    if (!(call instanceof Stream)) return; // of a request that has ended
    if (chunk.seq !== call.nextSeq) {
      this.cancel(call);
      this.#end(call, new ZmqserveError(50403, `chunk ${chunk.seq} came where ${call.nextSeq} was due`, { retryable: true }));
      return;
    }
    call.push({ ...chunk, token_ids: bytesToIds(chunk.token_ids) });
  }

  #done(call, done) {
    if (done.finish_reasons.includes('cancelled') && !(call instanceof Stream)) {
      this.#end(call, new DOMException('the request was cancelled', 'AbortError'));
      return;
    }
    // A Done without a worker is the controller's own, whose count says nothing.
    if (done.timings.worker !== '' && done.seq !== call.nextSeq) {
      this.#end(call, new ZmqserveError(50403, `the answer ended at ${done.seq} where ${call.nextSeq} was due`, { retryable: true }));
      return;
    }
    const { last, ...end } = done;
    if (last) this.#chunk(last);
    this.#end(call, null, end);
  }

  #error({ rid, code, message, retryable, retry_after_ms, data }) {
    const error = new ZmqserveError(code, message, { retryable, retry_after_ms, data });
    if (rid === 0n && code === 40003) this.#lose(error);
    else if (rid === 0n) process.emitWarning(error); // a message of ours that could not be read; a Pong tells if it was a request
    else if (this.#open.has(rid) && code !== 40901) this.#end(this.#open.get(rid), error); // 40901 is not about the open one
  }

  #end(call, error, message) {
    if (!this.#open.delete(call.rid)) return;
    if (this.#open.size === 0) clearInterval(this.#timer);
    call.end(error, message);
  }
}

const lost = (text) => new ZmqserveError(50402, text, { retryable: true });

/** One open request: `done` is its end. */
class Call {
  constructor(client) {
    this.client = client;
    // 63 random bits and never 0: who knows a rid can cancel the request.
    this.rid = (randomBytes(8).readBigUInt64BE() >> 1n) || 1n;
    this.done = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    this.done.catch(() => {}); // a stream's reader gets the error by reading
  }

  end(error, message) {
    if (error) this.reject(error);
    else this.resolve(message);
  }
}

/** A streamed answer. Chunks that are not read yet wait here, in memory without bound: read, or cancel. */
class Stream extends Call {
  nextSeq = 0;
  #chunks = [];
  #ended = false;
  #error = null;
  #wake = () => {};

  push(chunk) {
    this.nextSeq += 1;
    this.#chunks.push(chunk);
    this.#wake();
  }

  end(error, message) {
    this.#ended = true;
    this.#error = error;
    super.end(error, message);
    this.#wake();
  }

  cancel() {
    this.client.cancel(this);
  }

  /** The text of choice 0, when all of it is there. */
  async text() {
    let text = '';
    for await (const chunk of this) if (chunk.index === 0) text += chunk.text;
    return text;
  }

  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        while (this.#chunks.length) yield this.#chunks.shift();
        if (this.#ended) break;
        await new Promise((resolve) => { this.#wake = resolve; });
      }
      if (this.#error) throw this.#error;
    } finally {
      this.cancel(); // harmless at the end; a loop that was left early frees its slot
    }
  }
}
