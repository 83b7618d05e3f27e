"""Text from prompts: incremental decoding, and stop strings across the borders of tokens."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.data.tokenizers import StreamDecoder, Tokenizer
from dsv3_jax.inference.generation import NO_TOKEN, STEPS_A_CALL, Generator
from dsv3_jax.inference.sampling import GREEDY, Sampling


class StopStrings:
    """Cuts a growing text before the first stop string. Text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far may now be shown."""
        if self.found:
            return ""
        held = self._held + text
        # The one that is complete first, whatever the pieces in which the text comes.
        places = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass
class Completion:
    """text: without the prompt and the stop string. num_tokens: made for it. stopped: by a stop id or string, not for
    want of room."""

    text: str = ""
    num_tokens: int = 0
    stopped: bool = False


class TextStream:
    """Generates text; iterating gives the new text of each row. `completions` holds what each row has so far.

    Ends when every row has, be it by a stop id of the tokenizer, a stop string, `max_new_tokens` or a full context.

    Args:
      prompts: ids, as `Tokenizer.encode_prompt` or `encode_chat` gives them.
      stop: texts before which a row ends. One that spells a special token stands for that token.
      stream: give each token at once; otherwise several steps run on the device before anything is seen.

    Raises:
      ConfigError: as `Generator.stream`.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        task: str = "",
        stream: bool = False,
    ):
        self.completions = [Completion() for _ in prompts]
        self._decoders = [StreamDecoder(tokenizer, [int(i) for i in prompt]) for prompt in prompts]
        self._stops = [StopStrings(stop) for _ in prompts]
        self._ended = [False for _ in prompts]
        self._room = generator.room(prompts, max_new_tokens)
        self._steps = generator.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=tokenizer.stop_ids | {i for text in stop if (i := tokenizer.special_id(text)) is not None},
            task=task,
            steps_a_call=1 if stream else STEPS_A_CALL,
        )

    def __iter__(self) -> Iterator[list[str]]:
        for tokens_BN in self._steps:
            yield [self._push(row, tokens_BN[row]) for row in range(len(self.completions))]
            if all(self._ended):
                break
        yield [self._finish(row) for row in range(len(self.completions))]

    def _push(self, row: int, tokens_N: np.ndarray) -> str:
        """Token by token, so that those after a stop string are not counted."""
        new = ""
        for token in tokens_N.tolist():
            self._ended[row] |= token == NO_TOKEN
            if self._ended[row]:
                break
            self.completions[row].num_tokens += 1
            new += self._stops[row].push(self._decoders[row].push([token]))
            self._ended[row] = self._stops[row].found or self.completions[row].num_tokens == self._room[row]
        return self._add(row, new)

    def _finish(self, row: int) -> str:
        """What was held back, in case it was not the beginning of a stop string after all."""
        stops = self._stops[row]
        new = stops.push(self._decoders[row].flush()) + stops.flush()
        self.completions[row].stopped |= self.completions[row].num_tokens < self._room[row]
        return self._add(row, new)

    def _add(self, row: int, new: str) -> str:
        self.completions[row].text += new
        self.completions[row].stopped |= self._stops[row].found
        return new


def complete(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], **options) -> list[Completion]:
    """The completion of each prompt; arguments and errors as `TextStream`."""
    stream = TextStream(generator, tokenizer, prompts, **options)
    for _ in stream:
        pass
    return stream.completions


def tokens_per_second(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], **options) -> float:
    """Of one call of `complete`, whose arguments it takes, prefill included. An equal call before it compiles."""
    begin = time.perf_counter()
    completions = complete(generator, tokenizer, prompts, **options)
    return sum(completion.num_tokens for completion in completions) / (time.perf_counter() - begin)
