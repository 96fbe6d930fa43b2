// The messages of zmqserve's wire protocol, version 1, as PROTOCOL.md lists them.
//
// A message is a msgpack array: its tag, then its fields in order; fields at the end that have their default are left out. A table
// below gives each field as [name, type] (required) or [name, type, default]; a field whose default is null may be null.
// Types: int, float, str, bool, bin (Uint8Array), map, any; id: a 63-bit number, always a BigInt here; [x]: an array of x; a part.

import { decode as unpack, encode as pack } from '@msgpack/msgpack';

export const PROTOCOL = 1;

const part = (...fields) => ({ tag: null, fields });
const message = (tag, ...fields) => ({ tag, fields });

export const ChatMessage = part(['role', 'str'], ['content', 'str']);
export const Resume = part(['token_ids', 'bin'], ['characters', 'int'], ['next_seq', 'int'], ['prompt_token_ids', 'bin', null]);
export const TopLogprob = part(['token_id', 'int'], ['text', 'str'], ['logprob', 'float']);
export const TokenLogprob = part(['token_id', 'int'], ['text', 'str'], ['logprob', 'float'], ['top', [TopLogprob], []]);
export const Usage = part(['prompt_tokens', 'int'], ['completion_tokens', 'int'], ['cached_tokens', 'int', 0]);
export const Timings = part(['worker', 'str'], ['queue_ms', 'float', 0], ['first_ms', 'float', 0], ['total_ms', 'float', 0]);
export const Choice = part(['text', 'str'], ['token_ids', 'bin'], ['finish_reason', 'str'], ['logprobs', [TokenLogprob], null]);
// FirstChunk is a Chunk with one more field, so one table reads both.
export const Chunk = message(36, ['rid', 'id'], ['seq', 'int'], ['index', 'int'], ['text', 'str'], ['token_ids', 'bin'],
  ['logprobs', [TokenLogprob], null], ['fingerprint', 'str', null]);

// The controller reads only these fields of a request, and forwards the bytes to a worker.
const request = [['rid', 'id'], ['model', 'str'], ['priority', 'int', 0], ['deadline_ms', 'int', null], ['affinity', 'str', null],
  ['attempts', 'int', 0], ['fingerprint', 'str', null], ['trace', 'str', null]];

export const MESSAGES = {
  Hello: message(1, ['protocol', 'int'], ['client', 'str', '']),
  Generate: message(2, ...request, ['stream', 'bool', true], ['prompt', 'str', null], ['messages', [ChatMessage], null],
    ['token_ids', 'bin', null], ['params', 'map', {}], ['resume', Resume, null], ['extra', 'map', null]),
  Embed: message(3, ...request, ['texts', ['str'], []], ['params', 'map', {}], ['extra', 'map', null]),
  CountTokens: message(4, ...request, ['prompt', 'str', null], ['messages', [ChatMessage], null]),
  ModelDetails: message(5, ...request),
  ListModels: message(6, ['rid', 'id']),
  Status: message(7, ['rid', 'id']),
  Drain: message(8, ['rid', 'id'], ['worker', 'str'], ['grace_ms', 'int', null]),
  Cancel: message(9, ['rid', 'id']),
  Ping: message(10, ['ttl_ms', 'int'], ['rids', ['id'], []]),
  Welcome: message(33, ['protocol', 'int'], ['controller', 'str'], ['limits', 'map'], ['version', 'str', '']),
  Pong: message(34, ['controller', 'str'], ['unknown', ['id'], []]),
  GoAway: message(35, ['why', 'str']),
  Chunk,
  Chunks: message(37, ['chunks', [Chunk]]),
  Done: message(38, ['rid', 'id'], ['seq', 'int'], ['finish_reasons', ['str']], ['usage', Usage], ['timings', Timings],
    ['last', Chunk, null]),
  Reply: message(39, ['rid', 'id'], ['choices', [Choice]], ['usage', Usage], ['timings', Timings]),
  Embedding: message(40, ['rid', 'id'], ['dtype', 'str'], ['shape', ['int']], ['data', 'bin'], ['usage', Usage], ['timings', Timings]),
  Tokens: message(41, ['rid', 'id'], ['count', 'int'], ['context_length', 'int', 0]),
  Details: message(42, ['rid', 'id'], ['card', 'map']),
  Models: message(43, ['rid', 'id'], ['models', ['map']]),
  StatusReply: message(44, ['rid', 'id'], ['status', 'map']),
  DrainReply: message(45, ['rid', 'id'], ['worker', 'str'], ['running', 'int']),
  Error: message(46, ['rid', 'id'], ['code', 'int'], ['message', 'str'], ['retryable', 'bool', false], ['retry_after_ms', 'int', null],
    ['data', 'map', {}]),
};

// What a worker and a controller say to each other: a head, and a payload where the kind has one.
export const KIND = {
  READY: 65, LOAD: 66, BUSY: 67, DRAINING: 68, BYE: 69, FIRST: 70, MORE: 71, DONE: 72, FAILED: 73,
  WELCOME: 97, REFUSED: 98, REQUEST: 99, CANCEL: 100, BEAT: 101, REREGISTER: 102, DRAIN: 103,
};
export const WorkerHead = part(['kind', 'int'], ['epoch', 'id'], ['client', 'id', 0n], ['rid', 'id', 0n], ['outcome', 'str', ''],
  ['code', 'int', 0], ['prompt_tokens', 'int', 0], ['completion_tokens', 'int', 0]);
export const ControllerHead = part(['kind', 'int'], ['epoch', 'id'], ['client', 'id', 0n], ['rid', 'id', 0n],
  ['deadline_ms', 'int', null], ['attempts', 'int', 0], ['queue_ms', 'float', 0]);
export const Ready = part(['protocol', 'int'], ['name', 'str'], ['backend', 'str'], ['state', 'str'], ['models', ['map']],
  ['slots', 'int'], ['speed', 'float'], ['ttl_ms', 'int'], ['controllers', ['str'], []], ['version', 'str', '']);
export const Load = part(['running', 'int'], ['waiting', 'int'], ['yours', 'int'], ['step_age_ms', 'float', 0]);
export const WorkerWelcome = part(['protocol', 'int'], ['controller', 'str'], ['ttl_ms', 'int'], ['version', 'str', ''],
  ['message_bytes', 'int', 0]);
export const Refused = part(['code', 'int'], ['why', 'str'], ['retry_after_ms', 'int', null]);

const NAMES = {
  40000: 'RequestError', 40001: 'MalformedMessage', 40003: 'ProtocolMismatch', 40103: 'Refused', 40301: 'UnknownModel',
  40302: 'InvalidParameter', 40303: 'ContextOverflow', 40304: 'Unsupported', 40305: 'InvalidEndpoint', 40801: 'DeadlineExceeded',
  40901: 'DuplicateRequest', 42900: 'RetryLater', 42903: 'Overloaded', 42904: 'SlowConsumer', 50001: 'BackendError', 50002: 'OutOfMemory',
  50005: 'NoWorker', 50007: 'WorkerLost', 50201: 'UpstreamError', 50301: 'ModelLoading', 50302: 'GoingAway', 50400: 'ConnectionFailed',
  50401: 'ControllerUnreachable', 50402: 'ControllerLost', 50403: 'StreamGap', 50405: 'BindFailed',
};

/** An Error message, to be thrown: `code` and `name` tell which, `retryable` whether the same request may work later. */
export class ZmqserveError extends Error {
  constructor(code, text, { retryable = false, retry_after_ms = null, data = {} } = {}) {
    super(text);
    this.code = code;
    this.name = NAMES[code] ?? 'ZmqserveError';
    Object.assign(this, { retryable, retry_after_ms, data });
  }
}

/** The bytes of a message with a tag, like encode('Cancel', { rid }). */
export const encode = (type, values) => encodePart(MESSAGES[type], values);

/** The bytes of a head or of a payload without a tag, like encodePart(Load, { running: 1, waiting: 0, yours: 1 }). */
export const encodePart = (table, values) => pack(toArray(table, values), { useBigInt64: true });

/** A message with a tag as { type, ...fields }; { type: null } for a tag that is not in the tables (a newer peer's). */
export function decode(bytes) {
  const array = toValues(bytes);
  const type = BY_TAG.get(array[0]);
  return type ? { type, ...fromArray(MESSAGES[type], array, type) } : { type: null };
}

/** A head or a payload without a tag as its fields. */
export const decodePart = (table, bytes) => fromArray(table, toValues(bytes), 'payload');

const BY_TAG = new Map(Object.entries(MESSAGES).map(([type, { tag }]) => [tag, type]));

function toValues(bytes) {
  let array;
  try {
    array = unpack(bytes, { useBigInt64: true });
  } catch (error) {
    throw new ZmqserveError(40001, `not msgpack: ${error.message}`);
  }
  if (!Array.isArray(array)) throw new ZmqserveError(40001, 'not a msgpack array');
  return array;
}

function toArray({ tag, fields }, values) {
  const array = fields.map(([name, type, missing]) => write(type, values[name] ?? missing, name));
  while (array.length && isDefault(array.at(-1), fields[array.length - 1][2])) array.pop();
  return tag === null ? array : [tag, ...array];
}

function fromArray({ tag, fields }, array, where) {
  const first = tag === null ? 0 : 1;
  // Elements after those that the table knows are a newer peer's, and ignored.
  return Object.fromEntries(fields.map(([name, type, missing], i) => {
    const value = array[first + i];
    if (value === undefined && missing === undefined) throw new ZmqserveError(40001, `${where}: ${name} is missing`);
    if (value === undefined || (value === null && missing === null)) return [name, missing];
    return [name, read(type, value, `${where}.${name}`)];
  }));
}

function write(type, value, name) {
  if (value === undefined) throw new ZmqserveError(40001, `${name} is missing`);
  if (value === null) return null;
  if (Array.isArray(type)) return Array.from(value, (x) => write(type[0], x, name));
  if (typeof type === 'object') return toArray(type, value);
  return wire(value);
}

function read(type, value, where) {
  if (Array.isArray(type)) {
    if (Array.isArray(value)) return value.map((x) => read(type[0], x, where));
  } else if (typeof type === 'object') {
    if (Array.isArray(value)) return fromArray(type, value, where);
  } else if (type === 'id') {
    if (isInteger(value)) return BigInt(value);
  } else if (type === 'any' || IS[type](value)) {
    return plain(value);
  }
  throw new ZmqserveError(40001, `${where} is not ${Array.isArray(type) ? 'an array' : type}`);
}

const isInteger = (x) => typeof x === 'bigint' || Number.isInteger(x);
const isMap = (x) => typeof x === 'object' && x !== null && Object.getPrototypeOf(x) === Object.prototype;
const IS = {
  int: isInteger,
  float: (x) => typeof x === 'number' || typeof x === 'bigint',
  str: (x) => typeof x === 'string',
  bool: (x) => typeof x === 'boolean',
  bin: (x) => x instanceof Uint8Array,
  map: isMap,
};

const isDefault = (value, missing) => {
  if (missing === undefined) return false;
  if (Array.isArray(missing)) return value.length === 0;
  if (isMap(missing)) return Object.keys(value).length === 0;
  return typeof missing === 'bigint' ? BigInt(value) === missing : value === missing;
};

// With useBigInt64 the library writes a number over 32 bits as a float, and a BigInt always as 64 bits: each becomes the other, so that
// an integer is never a float, and is as short as the canonical MORE head wants it.
function wire(value) {
  if (typeof value === 'bigint') return value >= -0x80000000n && value <= 0xffffffffn ? Number(value) : value;
  if (Number.isSafeInteger(value)) return value < -0x80000000 || value > 0xffffffff ? BigInt(value) : value;
  return inside(value, wire);
}

// What is read: BigInt only for what a number cannot hold exactly.
function plain(value) {
  if (typeof value === 'bigint') return Number.isSafeInteger(Number(value)) ? Number(value) : value;
  return inside(value, plain);
}

function inside(value, change) {
  if (Array.isArray(value)) return value.map(change);
  return isMap(value) ? Object.fromEntries(Object.entries(value).map(([key, x]) => [key, change(x)])) : value;
}

// Token ids are u32 and vectors are float32, little-endian on every machine; the bytes of a message need not be aligned, so no views.

export function idsToBytes(ids) {
  const view = new DataView(new ArrayBuffer(4 * ids.length));
  ids.forEach((id, i) => view.setUint32(4 * i, id, true));
  return new Uint8Array(view.buffer);
}

export function bytesToIds(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Uint32Array.from({ length: bytes.byteLength / 4 }, (_, i) => view.getUint32(4 * i, true));
}

/** Vectors of equal length as an Embedding's `shape` and `data`. */
export function vectorsToBytes(vectors) {
  const columns = vectors[0].length;
  const view = new DataView(new ArrayBuffer(4 * vectors.length * columns));
  vectors.forEach((vector, row) => vector.forEach((x, i) => view.setFloat32(4 * (row * columns + i), x, true)));
  return { shape: [vectors.length, columns], data: new Uint8Array(view.buffer) };
}

/** An Embedding's `shape` and `data` as one Float32Array per text. */
export function bytesToVectors([rows, columns], bytes) {
  const size = bytes.byteLength;
  if (size !== 4 * rows * columns) throw new ZmqserveError(40001, `${size} bytes are not ${rows} x ${columns} float32`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, size);
  const vector = (row) => Float32Array.from({ length: columns }, (_, i) => view.getFloat32(4 * (row * columns + i), true));
  return Array.from({ length: rows }, (_, row) => vector(row));
}
