// Asks a controller one thing and prints what comes as lines of JSON:
//
//   node ask.mjs generate '{"model": "echo", "prompt": "a b c", "params": {"max_tokens": 2}}'    each chunk, then the end
//   node ask.mjs ask|embed|countTokens|modelDetails '{"model": "echo", ...}'
//   node ask.mjs models|status
//
// --controller ENDPOINT says where; --cancel-after N cancels a stream after so many chunks; Ctrl-C cancels too.
// An error is the last line, {"error": name, "code": ..., ...}, with exit code 1.

import { parseArgs } from 'node:util';
import { Client } from './client.mjs';

const { values, positionals: [verb, request = '{}'] } = parseArgs({
  allowPositionals: true,
  options: {
    controller: { type: 'string', default: 'tcp://127.0.0.1:5570' },
    'cancel-after': { type: 'string', default: 'Infinity' },
    'ttl-ms': { type: 'string', default: '3000' },
  },
});

const print = (value) => console.log(JSON.stringify(value, (_, x) => {
  if (typeof x === 'bigint') return String(x);
  return x instanceof Uint32Array || x instanceof Float32Array ? [...x] : x;
}));

const client = new Client(values.controller, { ttlMs: Number(values['ttl-ms']) });
const interrupted = new AbortController();
process.once('SIGINT', () => interrupted.abort());
try {
  const asked = { ...JSON.parse(request), signal: interrupted.signal };
  if (verb === 'generate') {
    const stream = client.generate(asked);
    let count = 0;
    for await (const chunk of stream) {
      print(chunk);
      count += 1;
      if (count === Number(values['cancel-after'])) stream.cancel();
    }
    print(await stream.done);
  } else if (['ask', 'embed', 'countTokens', 'modelDetails', 'models', 'status'].includes(verb)) {
    print(await client[verb](asked));
  } else {
    throw new TypeError(`unknown verb ${verb}: one of generate, ask, embed, countTokens, modelDetails, models, status`);
  }
} catch (error) {
  const { name, message, code, retryable, retry_after_ms, data } = error;
  print({ error: name, message, code, retryable, retry_after_ms, data });
  process.exitCode = 1;
} finally {
  await client.close();
}
