// Parameters of a request: an unknown one and a wrong value are 40302, one that the model cannot honour is 40304; none is ever ignored.

import { ZmqserveError } from './protocol.mjs';

const isNumber = (low, high) => (x) => typeof x === 'number' && x >= low && x <= high;
const isInteger = (low, high = 2 ** 31 - 1) => (x) => (typeof x === 'bigint' || Number.isInteger(x)) && x >= low && x <= high;
const isBool = (x) => typeof x === 'boolean';
const isList = (most, check) => (x) => Array.isArray(x) && x.length <= most && x.every(check);
const isText = (x) => typeof x === 'string' && x.length > 0 && [...x].length <= 1024; // in code points
const orNull = (check) => (x) => x === null || check(x);
const above0 = (high) => (x) => isNumber(0, high)(x) && x > 0;

// name: [default, check]
export const SAMPLING = {
  max_tokens: [null, orNull(isInteger(1))],
  min_tokens: [0, isInteger(0)],
  temperature: [1, isNumber(0, 100)],
  top_p: [1, above0(1)],
  top_k: [0, isInteger(0)],
  min_p: [0, isNumber(0, 1)],
  presence_penalty: [0, isNumber(-2, 2)],
  frequency_penalty: [0, isNumber(-2, 2)],
  repetition_penalty: [1, above0(100)],
  stop: [[], isList(64, isText)],
  stop_token_ids: [[], isList(1024, isInteger(0, 2 ** 32 - 1))],
  seed: [null, orNull(isInteger(0, 2n ** 63n - 1n))],
  n: [1, isInteger(1, 128)],
  logprobs: [null, orNull(isInteger(0, 100))],
  echo: [false, isBool],
  ignore_eos: [false, isBool],
  skip_special_tokens: [true, isBool],
  guided: [null, orNull((x) => typeof x === 'object' && Object.keys(x).length === 1)],
};

export const EMBEDDING = {
  dimensions: [null, orNull(isInteger(1))],
  normalize: [null, orNull(isBool)],
  truncate_tokens: [null, orNull(isInteger(1))],
};

/** Throws where `params` ask for what is not in `honours` (a Set of names), or is no parameter at all. */
export function check(table, params, honours) {
  for (const [name, value] of Object.entries(params)) {
    if (!Object.hasOwn(table, name)) throw wrong(40302, name, `there is no parameter ${name}`);
    const [usual, isRight] = table[name];
    if (!isRight(value)) throw wrong(40302, name, `${name} = ${show(value)} is of the wrong type or out of range`);
    if (name === 'min_tokens' && value > (params.max_tokens ?? Infinity)) throw wrong(40302, name, 'min_tokens is more than max_tokens');
    if (!honours.has(name) && show(value) !== show(usual)) throw wrong(40304, name, `this model does not honour ${name}`);
  }
}

export const wrong = (code, parameter, text) => new ZmqserveError(code, text, { data: { parameter } });

const show = (value) => (typeof value === 'bigint' ? String(value) : JSON.stringify(value));
