// A worker with a toy model: `node echo_worker.mjs [--controller ENDPOINT]... [--model NAME] [--name NAME] [--slots N] [--step-ms MS]`.
// It repeats the prompt's words, one at a step, and embeds each text as a fixed vector, so that its answers are known beforehand.
// SIGTERM and SIGINT drain it.

import { setImmediate as turn, setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { ZmqserveError } from './protocol.mjs';
import { wrong } from './params.mjs';
import { Worker } from './worker.mjs';

const CONTEXT = 8192;
const DIMENSIONS = 8;

export class Echo {
  // It is deterministic: at any temperature, and with any seed.
  honours = new Set(['max_tokens', 'temperature', 'seed']);

  constructor(name, stepMs = 0) {
    this.stepMs = stepMs;
    this.card = {
      name, fingerprint: 'node-echo-1', context_length: CONTEXT, verbs: ['generate', 'chat', 'embed', 'count_tokens', 'model_details'],
      embedding_dim: DIMENSIONS,
    };
  }

  count(request) {
    return words(request).length;
  }

  /** A token is a word with the white space before it; its id is its place in the prompt. */
  async *generate(request, signal) {
    const prompt = words(request);
    const most = Math.min(prompt.length, Number(request.params.max_tokens ?? CONTEXT));
    if (prompt.length + most > CONTEXT) throw new ZmqserveError(40303, `${prompt.length} + ${most} words are more than ${CONTEXT} tokens`);
    if (most === 0) yield { text: '', token_ids: [], finish_reason: 'stop' };
    for (let i = 0; i < most; i += 1) {
      // Each step gives way once, so that a Cancel is read in time.
      await (this.stepMs ? sleep(this.stepMs, undefined, { signal }) : turn());
      const finish = i + 1 < most ? null : most < prompt.length ? 'length' : 'stop';
      yield { text: prompt[i], token_ids: [i], finish_reason: finish };
    }
  }

  /** Dimension d of a text is the sum of its code points whose place is d modulo 8. */
  async embed({ texts }) {
    if (texts.length === 0 || texts.includes('')) throw wrong(40302, 'texts', 'texts: at least one, and none empty');
    return texts.map((text) => {
      const vector = new Float32Array(DIMENSIONS);
      [...text].forEach((character, i) => { vector[i % DIMENSIONS] += character.codePointAt(0); });
      return vector;
    });
  }
}

function words({ prompt = null, messages = null, token_ids = null }) {
  const given = [prompt, messages, token_ids].filter((x) => x !== null);
  if (given.length !== 1) throw wrong(40302, 'prompt', `exactly one of prompt, messages and token_ids is set, not ${given.length}`);
  if (given[0].length === 0) throw wrong(40302, 'prompt', 'there is nothing to answer');
  if (token_ids) throw wrong(40304, 'token_ids', 'this model has no vocabulary: give it a prompt or messages');
  return (prompt ?? messages.at(-1).content).match(/\s*\S+/g) ?? [];
}

const { values } = parseArgs({
  options: {
    controller: { type: 'string', multiple: true, default: ['tcp://127.0.0.1:5571'] },
    model: { type: 'string', default: 'echo' },
    name: { type: 'string', default: `node-${process.pid}` },
    slots: { type: 'string', default: '4' },
    'step-ms': { type: 'string', default: '0' },
    'ttl-ms': { type: 'string', default: '3000' },
  },
});
const worker = new Worker({
  name: values.name, endpoints: values.controller, models: [new Echo(values.model, Number(values['step-ms']))],
  slots: Number(values.slots), ttlMs: Number(values['ttl-ms']), backend: 'node-echo',
});
process.on('SIGTERM', () => worker.drain());
process.on('SIGINT', () => worker.drain());
worker.ended.catch((error) => {
  console.error(`${error.name}: ${error.message}`);
  process.exitCode = 1;
});
