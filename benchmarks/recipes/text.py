"""A transformer or a GRU that learns a language, character by character, and writes in it.

    python benchmarks/recipes/text.py [--model gru] [--steps 3000] [--write 2000] [--torch]

The language is that of a small grammar: "the cats that the dog follows see." On average no model
can take fewer bits per character than the choices that made the text, and those we know exactly.
To come near them, it has to remember across all clauses between which noun was plural.

--torch trains the same network in PyTorch (text_torch.py) as well, from the same first weights and
on the same batches, and says how far the losses are apart. README.md has the results.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where purenn.py is
import training.one_thread  # noqa: F401  # before NumPy, which then takes one  # isort: skip

import numpy as np

import purenn as nn

# --- the text ---

# A capital stands for any of its alternatives, all equally likely. They begin with different
# characters, so that each choice is made, and costs its bits, at one character of the text.
GRAMMAR = {
    "S": ["\nthe NC."],
    "C": ["s P", " Q"],  # of cats, or of a cat
    "P": ["V", "that the NC V"],  # the cats see, the cats that the dog follows see
    "Q": ["Vs", "that the NC Vs"],  # the cat sees, the cat that the dogs follow sees
    "N": ["bird", "cat", "dog", "friend", "girl", "horse", "king", "lion"],
    "V": ["call", "follow", "hear", "know", "lead", "paint", "see", "visit"],
}
ALPHABET = sorted({*"".join(itertools.chain(*GRAMMAR.values()))} - GRAMMAR.keys())
CONTEXT = 64  # characters that a model sees


def compose(seed: int, length: int) -> str:
    """Sentences of the grammar, the last one cut off."""
    choose, text, rest = random.Random(seed).choice, "", ""
    while len(text) < length:
        symbol, rest = rest[:1] or "S", rest[1:]
        if symbol in GRAMMAR:
            rest = choose(GRAMMAR[symbol]) + rest
        else:
            text += symbol
    return text


@cache
def first(symbol: str) -> set[str]:
    """The characters with which a symbol can begin."""
    if symbol not in GRAMMAR:
        return {symbol}
    return set().union(*(first(alternative[0]) for alternative in GRAMMAR[symbol]))


def surprise(text: str) -> list[float]:
    """-log2 p of each character of whole sentences, given what came before; inf at a mistake."""
    costs: list[float] = []
    rest = ""
    for character in text:
        cost, rest = 0.0, rest or "S"
        while (symbol := rest[0]) in GRAMMAR and character in first(symbol):
            cost += math.log2(len(GRAMMAR[symbol]))
            rest = next(a for a in GRAMMAR[symbol] if character in first(a[0])) + rest[1:]
        if symbol != character:
            return [*costs, math.inf]
        costs.append(cost)
        rest = rest[1:]
    return costs


def encode(text: str) -> list[int]:
    """The number of each character."""
    return [ALPHABET.index(character) for character in text]


def sentences(text: str, values: Sequence[float]) -> np.ndarray:
    """A row for each start of a sentence: the values of CONTEXT characters and of the next one."""
    starts = [i for i, character in enumerate(text[:-CONTEXT]) if character == "\n"]
    return np.array(values)[np.array(starts)[:, None] + np.arange(CONTEXT + 1)]


def training_batches(text: str, steps: int) -> Iterator[np.ndarray]:
    """32 rows of characters for each step, every row once an epoch."""
    rows = sentences(text, encode(text))
    epochs = (nn.batches(len(rows), 32, key=epoch) for epoch in itertools.count())
    for index in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        yield rows[index]


# --- the networks: characters (N, T) -> logits of the next ones (N, T, K) ---

Layers = dict[str, nn.Layer]
WIDTH, HEADS, UNITS = 64, 4, 128


def transformer() -> Layers:
    """Two blocks of attention and an MLP, with the norms in the branches, as in GPT-2."""
    layers = {"embed": nn.embedding(len(ALPHABET), WIDTH), "position": nn.position_embedding()}
    for block in range(2):
        attention = nn.sequential(nn.layer_norm(), nn.attention(HEADS, causal=True))
        mlp = nn.sequential(nn.layer_norm(), nn.linear(4 * WIDTH), nn.gelu(), nn.linear(WIDTH))
        layers |= {f"attention{block}": nn.residual(attention), f"mlp{block}": nn.residual(mlp)}
    return layers | {"norm": nn.layer_norm(), "out": nn.linear(len(ALPHABET))}


def gru() -> Layers:
    """One layer of gated recurrent units."""
    ends = nn.embedding(len(ALPHABET), WIDTH), nn.linear(len(ALPHABET))
    return {"embed": ends[0], "gru": nn.gru(UNITS), "out": ends[1]}


MODELS = {"transformer": transformer, "gru": gru}


def train(
    net: nn.Layer, params: nn.Tree, data: Iterable[np.ndarray], rate: nn.Schedule
) -> Iterator[tuple[nn.Tree, float]]:
    """Params and loss after each step."""
    optimizer = nn.adam(rate)
    state = optimizer.init(params)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    for batch in data:
        loss, grads, _ = gradients(params, batch[:, :-1], batch[:, 1:])
        params, state = optimizer.step(params, grads, state)
        yield params, loss


def bits(loss: float | list[float]) -> np.ndarray:
    """Losses in bits."""
    return np.divide(loss, math.log(2))


# --- what it has learned ---


def evaluate(net: nn.Layer, params: nn.Tree, text: str) -> tuple[float, float]:
    """Bits per character of the model, and of the choices that made the text."""
    rows, costs = sentences(text, encode(text)), sentences(text, surprise(text))
    logits, _ = net.forward(params, rows[:, :-1])
    loss, _ = nn.softmax_cross_entropy(logits, rows[:, 1:])
    return float(bits(loss)), float(costs[:, 1:].mean())


def right(lines: list[str]) -> str:
    """How many are sentences of the grammar."""
    count = sum(math.isfinite(surprise(f"\n{line}\n")[-1]) for line in lines)
    return f"{count} of {len(lines)}"


def continue_text(net: nn.Layer, params: nn.Tree, text: str, count: int, seed: int) -> str:
    """The text and `count` more characters, drawn from what the network expects."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        context = text[-CONTEXT:]
        context = context[max(context.find("\n"), 0) :]  # from the start of a sentence, if it can
        logits, _ = net.forward(params, np.array([encode(context)]))
        noise = rng.gumbel(size=len(ALPHABET))  # the largest sum is a draw from softmax(logits)
        text += ALPHABET[(logits[0, -1] + noise).argmax()]
    return text


# --- all of it ---


def compare(layers: Layers, params: nn.Tree, data: list[np.ndarray], rate: nn.Schedule) -> None:
    """Print how far the losses of purenn and PyTorch are apart, in either precision."""
    import text_torch

    for dtype in (np.float64, np.float32):
        start = nn.tree_map(partial(np.asarray, dtype=dtype), params)
        twin = text_torch.twin(layers, start, HEADS)
        ours = bits([loss for _, loss in train(nn.sequential(**layers), start, data, rate)])
        theirs = bits(list(text_torch.train(twin, data, rate)))
        print(
            f"{dtype.__name__}: from {ours[0]:.3f} to {ours[-1]:.3f} bits per character in"
            f" {len(ours)} steps; at most {abs(ours - theirs).max():.1e} from PyTorch's"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure on text of its own, and write; or compare with PyTorch."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="transformer")
    parser.add_argument("--steps", type=int, help="default 3000; 100 with --torch")
    parser.add_argument("--write", type=int, default=2000, help="characters (default 2000)")
    parser.add_argument("--torch", action="store_true", help="compare the losses with PyTorch's")
    options = parser.parse_args(arguments)
    steps = options.steps or (100 if options.torch else 3000)
    started = time.perf_counter()
    nn.keep_freed_memory()
    layers = MODELS[options.model]()
    net = nn.sequential(**layers)
    params, _ = net.init(0, (CONTEXT,))
    rate = nn.warmup(nn.cosine(3e-3, steps), 50)
    data = training_batches(compose(0, 1_000_000), steps)
    if options.torch:
        try:
            compare(layers, params, list(data), rate)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            parser.error("--torch needs PyTorch: pip install torch")
        return

    print(f"{options.model}, {nn.count_parameters(params):,} parameters")
    for step, (trained, loss) in enumerate(train(net, params, data, rate), start=1):
        params = trained
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: {bits(loss):.3f} bits per character", flush=True)
    model, text = evaluate(net, params, compose(1, 20_000))
    print(f"new text: {model:.4f} bits per character, {text:.4f} by the choices that made it")
    seconds = time.perf_counter() - started
    lines = continue_text(net, params, "\nthe", options.write, seed=0).split("\n")[1:-1]
    short = [line for line in lines if len(line) < CONTEXT]  # it saw where they began
    print(*lines[:5], sep="\n")
    print(f"{right(lines)} sentences are right, {right(short)} that fit into its context")
    print(f"{seconds:.0f} seconds to learn")


if __name__ == "__main__":
    main()
