"""A request's parameters as vLLM's, and vLLM's logprobs as ours."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from zmqserve.errors import InvalidParameter, ZmqserveError
from zmqserve.messages import TokenLogprob, TopLogprob
from zmqserve.params import Guided, SamplingParams

from .guided_errors import cannot_be_followed, check_multiples, kind_of

_MAX_SEED = 2**63 - 1
_GREEDY_BELOW = 1e-5


def sampling(params: SamplingParams, max_tokens: int, *, index: int = 0, received: int = 0) -> Any:
    """vLLM's SamplingParams for choice `index`, of at most `max_tokens` tokens of which `received` were made elsewhere.

    vLLM neither makes text nor looks for stop strings: the worker reads ids as the other backends do, and as a resumed answer must.
    Raises InvalidParameter for what vLLM refuses.
    """
    # Not from vllm itself, which looks for its names anew each time.
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VllmParams

    guided = params.guided
    if guided is not None:
        check_multiples(f"guided.{kind_of(guided)}", guided.json or guided.grammar or "")
    try:
        structured = None
        if guided is not None:
            structured = StructuredOutputsParams(json=guided.json, regex=guided.regex, choice=guided.choice, grammar=guided.grammar)
        return VllmParams(
            max_tokens=max_tokens - received,
            min_tokens=max(0, params.min_tokens - received),
            # vLLM would raise a very low one to 0.01, which is not greedy.
            temperature=0.0 if params.temperature < _GREEDY_BELOW else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            stop_token_ids=list(params.stop_token_ids),
            seed=None if params.seed is None else _seed(params.seed, index, received),
            logprobs=params.logprobs,
            ignore_eos=params.ignore_eos,
            structured_outputs=structured,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,  # they are this request's alone: vLLM need not copy all that is in them
        )
    except Exception as error:
        raise refused(error, guided) from error


def refused(error: Exception, guided: Guided | None = None) -> Exception:
    """What a caller is told of what vLLM raised: a mistake of the request names its parameter.

    Where vLLM names none it is the form that the answer is to have, if it is `guided`: all else is checked before vLLM gets it.
    """
    from vllm.exceptions import VLLMValidationError

    if isinstance(error, ZmqserveError) or not isinstance(error, ValueError | TypeError | VLLMValidationError):
        return error
    name = getattr(error, "parameter", None)
    if guided is not None and name is None:
        return cannot_be_followed(f"guided.{kind_of(guided)}", str(error))
    return InvalidParameter(f"vLLM refuses the request: {' '.join(str(error).split())}", data={"parameter": name or "params"})


def token_logprobs(position: Mapping[int, Any], token_id: int, most: int, text_of: Callable[[int], str]) -> TokenLogprob:
    """The chosen token's entry, with the `most` likeliest beside it. `position`: vLLM's logprobs by token id.

    What could not come, as where a form left too few, is not told of.
    """
    likeliest = sorted(position.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0))[:most]
    top = [TopLogprob(other, text_of(other), each.logprob) for other, each in likeliest if each.logprob > -math.inf]
    return TokenLogprob(token_id, text_of(token_id), position[token_id].logprob, top)


def _seed(seed: int, index: int, received: int) -> int:
    """Choices differ, the first is that of a request without others. vLLM's generator begins anew in a resumed answer: what it drew
    for the tokens received must not be drawn once more."""
    if received:
        seed = int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, received), digest_size=8).digest(), "little") & _MAX_SEED
    return (seed + index) & _MAX_SEED
