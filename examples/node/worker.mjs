// A zmqserve worker: takes requests from any number of controllers (a Link each), runs them on its models, and leaves in good order.
//
// A model is an object with
//   card                       its ModelCard: { name, verbs, context_length, ... }
//   honours                    a Set of the parameters that it honours; any other that is not at its default is refused
//   count(request)             tokens of the prompt of a Generate or CountTokens
//   generate(request, signal)  an async iterable of { text, token_ids }, the last one with a finish_reason: 'stop' or 'length'
//   embed(request)             a promise of one Float32Array per text
// What it throws is the request's own end, as an Error to the client; a ZmqserveError with its code, all else with 50001.

import { Link } from './link.mjs';
import { EMBEDDING, SAMPLING, check, wrong } from './params.mjs';
import { ZmqserveError, decode, idsToBytes, vectorsToBytes } from './protocol.mjs';

const VERBS = { Generate: 'generate', Embed: 'embed', CountTokens: 'count_tokens', ModelDetails: 'model_details' };

export class Worker {
  #jobs = new Map(); // link, client and rid -> what runs
  #draining = false;
  #links = new Set();

  /** `ended` is resolved when every controller was left, and rejected when one refused this worker for good. */
  constructor({ name, endpoints, models, slots, backend = 'node', speed = 1, ttlMs = 3000, graceMs = 30_000 }) {
    Object.assign(this, { name, models, slots, backend, speed, ttlMs, graceMs });
    this.ended = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    for (const endpoint of endpoints) this.#links.add(new Link(endpoint, this));
  }

  /** Takes nothing new, finishes what runs within the grace time, and leaves all controllers. */
  drain(graceMs = this.graceMs) {
    if (this.#draining) return;
    this.#draining = true;
    for (const link of [...this.#links]) {
      link.draining();
      this.#leaveIfDone(link);
      // What still runs then is moved by the controller, which learns from BYE that it has to.
      setTimeout(() => link.leave(), graceMs).unref();
    }
  }

  // ---- what a Link asks ---------------------------------------------------------------------------------------------------------------

  offer() {
    return {
      name: this.name, backend: this.backend, state: 'ready', models: this.models.map(({ card }) => card), slots: this.slots,
      speed: this.speed, ttl_ms: this.ttlMs,
    };
  }

  load(link) {
    const running = [...this.#jobs.values()].filter(({ slot }) => slot);
    return { running: running.length, waiting: 0, yours: running.filter((job) => job.link === link).length };
  }

  onRequest(link, head, payload) {
    const { client, rid, queue_ms: queueMs } = head;
    const job = { link, client, rid, queueMs, arrived: performance.now(), abort: new AbortController() };
    try {
      job.request = decode(payload); // the controller has read its first eight fields only
      if (job.request.rid !== head.rid) throw new ZmqserveError(40001, `the request is ${job.request.rid}, its head says ${head.rid}`);
      const verb = VERBS[job.request.type];
      if (!verb) throw new ZmqserveError(40001, 'not a request for a worker');
      job.slot = verb === 'generate' || verb === 'embed';
      if (job.slot && (this.#draining || this.load(link).running >= this.slots)) {
        link.busy(head); // the request goes elsewhere, with nothing lost
        return;
      }
      job.model = this.#model(job.request, job.request.messages ? 'chat' : verb);
    } catch (error) {
      this.#fail(job, error);
      return;
    }
    const key = this.#key(link, head);
    this.#jobs.set(key, job);
    this.#changed();
    this.#run(job)
      .catch((error) => this.#fail(job, error))
      .finally(() => {
        if (this.#jobs.get(key) === job) this.#jobs.delete(key);
        this.#changed();
        this.#leaveIfDone(link);
      });
  }

  onCancel(link, head) {
    this.#jobs.get(this.#key(link, head))?.abort.abort();
  }

  onAbandon(link) {
    for (const [key, job] of this.#jobs) {
      if (job.link !== link) continue;
      job.abandoned = true;
      this.#jobs.delete(key);
      job.abort.abort();
    }
    this.#changed();
    this.#leaveIfDone(link);
  }

  onEnd(link, error) {
    this.#links.delete(link);
    this.onAbandon(link);
    if (error) this.reject(error);
    else if (this.#links.size === 0) this.resolve();
  }

  // ---- requests -------------------------------------------------------------------------------------------------------------------------

  #model({ model: name }, verb) {
    const model = this.models.find(({ card }) => card.name === name || card.aliases?.includes(name));
    if (!model) throw new ZmqserveError(40301, `this worker does not serve ${name}`, { data: { model: name } });
    if (!model.card.verbs.includes(verb)) throw wrong(40304, verb, `${name} does not ${verb}`);
    return model;
  }

  async #run(job) {
    const { link, model, request } = job;
    if (Object.keys(request.extra ?? {}).length) throw wrong(40304, 'extra', 'extra is reserved');
    if (request.resume) {
      // To the caller the answer is lost with the worker that began it.
      throw new ZmqserveError(50007, `${request.model} cannot go on with another worker's answer`, { data: { model: request.model } });
    }
    switch (request.type) {
      case 'Generate':
        check(SAMPLING, request.params, model.honours);
        return this.#generate(job);
      case 'Embed': {
        check(EMBEDDING, request.params, model.honours);
        const vectors = await model.embed(request);
        const usage = { prompt_tokens: request.texts.reduce((sum, prompt) => sum + model.count({ prompt }), 0), completion_tokens: 0 };
        return this.#done(job, 'Embedding', { dtype: 'float32', ...vectorsToBytes(vectors) }, 'ok', usage);
      }
      case 'CountTokens':
        return link.done(job, 'Tokens', { count: model.count(request), context_length: model.card.context_length }, 'ok');
      default:
        return link.done(job, 'Details', { card: model.card }, 'ok');
    }
  }

  async #generate(job) {
    const { link, model, request, rid, abort } = job;
    const usage = { prompt_tokens: model.count(request), completion_tokens: 0 };
    let [seq, last, reason, text] = [0, null, 'cancelled', ''];
    const ids = [];
    try {
      for await (const step of model.generate(request, abort.signal)) {
        if (abort.signal.aborted) break;
        job.firstMs ??= performance.now() - job.arrived;
        usage.completion_tokens += step.token_ids.length;
        text += step.text;
        ids.push(...step.token_ids);
        const chunk = { rid, seq, index: 0, text: step.text, token_ids: idsToBytes(step.token_ids) };
        if (step.finish_reason) {
          [reason, last] = [step.finish_reason, chunk];
          break;
        }
        if (!request.stream) continue;
        if (seq === 0) link.first(job, { ...chunk, fingerprint: model.card.fingerprint });
        else link.more(job, chunk);
        seq += 1;
      }
    } catch (error) {
      if (!abort.signal.aborted) throw error; // else the model woke up from a wait
    }
    if (request.stream) this.#done(job, 'Done', { seq, finish_reasons: [reason], last }, reason, usage);
    else this.#done(job, 'Reply', { choices: [{ text, token_ids: idsToBytes(ids), finish_reason: reason }] }, reason, usage);
  }

  #done(job, type, fields, outcome, usage) {
    if (job.abandoned) return;
    const totalMs = performance.now() - job.arrived;
    const timings = { worker: this.name, queue_ms: job.queueMs, first_ms: job.firstMs ?? totalMs, total_ms: totalMs };
    job.link.done(job, type, { ...fields, usage, timings }, outcome, usage);
  }

  #fail(job, error) {
    const typed = error instanceof ZmqserveError ? error : new ZmqserveError(50001, `${this.name}: ${error.message}`);
    if (!job.abandoned) job.link.failed(job, typed);
  }

  #changed() {
    for (const link of this.#links) link.loadChanged();
  }

  #leaveIfDone(link) {
    if (this.#draining && ![...this.#jobs.values()].some((job) => job.link === link)) link.leave();
  }

  #key(link, { client, rid }) {
    return `${link.endpoint} ${client} ${rid}`;
  }
}
