"""Continues prompts with a trained run, a Hugging Face folder or a GGUF file. Text to stdout, tokens/s to stderr.

Example:
  .venv/bin/python experiments/generate.py --workdir=/tmp/tiny --prompt="The king" --temperature=0.8 --top_p=0.95

One prompt is shown as it grows, several (--prompt=A --prompt=B) are one batch. --chat wraps each as a user's message.
--draft=mtp lets the model's multi-token-prediction modules draft (exact speculative decoding); the same prompts
are then generated again with and without it, to say what it gains.
"""

import sys
import time

from absl import flags

from dsv3_jax.command_line import run
from dsv3_jax.config import ConfigError

PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue. Several are one batch.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
HF = flags.DEFINE_string("hf", None, "Folder with config.json, safetensors and tokenizer.json.")
GGUF = flags.DEFINE_string("gguf", None, "A .gguf file of the Llama architecture.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "The most tokens a prompt gets.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Only the k most probable tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Only the fewest tokens whose probabilities reach p.")
MIN_P = flags.DEFINE_float("min_p", None, "Only tokens of at least min_p times the greatest probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the answer and is not shown.")
TASK = flags.DEFINE_string("task", "", "The task whose window or router condition holds, in a model that has these.")
DRAFT = flags.DEFINE_enum("draft", "none", ("none", "mtp"), "What drafts tokens for the model to check.")
CHAT = flags.DEFINE_bool("chat", False, "Wrap each prompt in the model's chat template.")


def main() -> None:
    """Flags -> model, tokenizer, settings -> one stream of text."""
    from dsv3_jax.inference import sources
    from dsv3_jax.inference.generation import Generator
    from dsv3_jax.inference.sampling import make_sampling
    from dsv3_jax.inference.speculative import SpeculativeGenerator
    from dsv3_jax.inference.text import TextStream, complete, tokens_per_second

    openers = {"workdir": sources.open_run, "hf": sources.open_hf, "gguf": sources.open_gguf}
    given = [name for name in openers if flags.FLAGS[name].value]
    if len(given) != 1:
        raise ConfigError(f"give one of --workdir, --hf and --gguf; {' and '.join(given) or 'none'} was given")
    sampling = make_sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    filters = {flag.name: flag.value for flag in (TOP_K, TOP_P, MIN_P) if flag.value is not None}
    if filters and TEMPERATURE.value == 0:
        name, value = next(iter(filters.items()))
        raise ConfigError(f"--{name}={value}: changes nothing at --temperature=0; set --temperature above 0 to sample")
    source = openers[given[0]](flags.FLAGS[given[0]].value)
    tokenizer, single = source.tokenizer, len(PROMPT.value) == 1

    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) if CHAT.value else tokenizer.encode_prompt(text)
        for text in PROMPT.value
    ]
    Chosen = SpeculativeGenerator if DRAFT.value == "mtp" else Generator
    generator = Chosen(source.config, source.variables, source.max_length)
    options = {"max_new_tokens": MAX_NEW_TOKENS.value, "sampling": sampling, "seed": SEED.value}
    options |= {"stop": STOP.value, "task": TASK.value}
    stream = TextStream(generator, tokenizer, prompts, **options, stream=single)
    begin = time.perf_counter()
    for pieces in stream:
        if single:
            print(pieces[0], end="", flush=True)
    seconds = time.perf_counter() - begin
    if single:
        print()
    else:
        for text, completion in zip(PROMPT.value, stream.completions, strict=True):
            print(f"--- {text}\n{completion.text}")
    tokens = sum(completion.num_tokens for completion in stream.completions)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s, compilation included", file=sys.stderr)
    if isinstance(generator, SpeculativeGenerator):
        print(generator.counts, file=sys.stderr)
    if isinstance(generator, SpeculativeGenerator) and generator.counts.drafted:
        plain = Generator(source.config, generator.variables, source.max_length)
        complete(plain, tokenizer, prompts, **options)  # compiles, as the text that was shown did
        drafted, undrafted = (tokens_per_second(each, tokenizer, prompts, **options) for each in (generator, plain))
        print(
            f"again, not streamed, compilation excluded: {drafted:.1f} tokens/s with the draft, {undrafted:.1f} "
            f"without: {drafted / undrafted:.2f} times as fast",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
