// Holds protocol.mjs against the golden vectors: `node vectors.mjs ../../tests/vectors/v1.json` prints what it checked, and what differs.
//
// `hex` and `short` must be read as `fields`; what is written again must be `short` (else `hex`) byte for byte, or, where those have a
// nested default or a whole float in full, be read as the same. Cards and parameters are maps: what the bytes leave out is a default.

import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { encode as pack } from '@msgpack/msgpack';
import * as protocol from './protocol.mjs';

const { KIND, MESSAGES, WorkerHead, decode, decodePart, encode, encodePart } = protocol;

// Integers over 2^53 must not pass through a double on their way out of the JSON.
const text = readFileSync(process.argv[2], 'utf8').replace(/([[:,]\s*)(\d{16,})(?=\s*[,}\]])/g, '$1"$2n"');
const vectors = JSON.parse(text, (_, x) => (typeof x === 'string' && /^\d{16,}n$/.test(x) ? BigInt(x.slice(0, -1)) : x));
const hex = (bytes) => Buffer.from(bytes).toString('hex');
const bytes = (digits) => new Uint8Array(Buffer.from(digits, 'hex'));
const count = { read: 0, exact: 0, equivalent: 0, 'maps, read inside other messages': 0, 'MORE heads': 0 };
const wrong = [];

for (const { name, type, hex: long, short, fields } of vectors.messages) {
  const table = type === 'FirstChunk' ? 'Chunk' : type; // one table reads both
  if (!MESSAGES[table] && !protocol[table]) {
    count['maps, read inside other messages'] += 1;
    continue;
  }
  const read = (binary) => (MESSAGES[table] ? decode(binary) : decodePart(protocol[table], binary));
  const message = read(bytes(long));
  const again = MESSAGES[table] ? encode(table, message) : encodePart(protocol[table], message);
  if (!says(message, fields)) wrong.push(`${name} is read as`, message);
  if (short && !isDeepStrictEqual(read(bytes(short)), message)) wrong.push(`${name}: short is not read as hex is`);
  if (!isDeepStrictEqual(read(again), message)) wrong.push(`${name} is written as ${hex(again)}`);
  count.read += 1;
  count[hex(again) === (short ?? long) ? 'exact' : 'equivalent'] += 1;
}
for (const { epoch, client, hex: golden } of vectors.more_heads) {
  const made = hex(encodePart(WorkerHead, { kind: KIND.MORE, epoch: BigInt(epoch), client: BigInt(client) }));
  if (made !== golden) wrong.push(`the MORE head of ${epoch}, ${client} is ${made}`);
  count['MORE heads'] += 1;
}
console.log(JSON.stringify(count));
wrong.forEach((difference) => console.log(difference));
process.exitCode = wrong.length ? 1 : 0;

// Whether a message says what a vector's `fields` say.
function says(value, golden) {
  if (value instanceof Uint8Array) return hex(value) === golden;
  if (Array.isArray(value)) return value.length === golden.length && value.every((x, i) => says(x, golden[i]));
  if (typeof value === 'object' && value !== null) {
    return Object.entries(value).every(([key, x]) => {
      if (key === 'type') return true;
      // The values of extra are msgpack.
      if (key === 'extra' && x !== null) return Object.keys(x).every((name) => hex(pack(x[name])) === golden.extra[name]);
      return key in golden ? says(x, golden[key]) : x === null; // a Chunk has no fingerprint
    });
  }
  return typeof value === 'bigint' ? value === BigInt(golden) : value === golden;
}
