"""What a teacher's stored word costs, what it is worth, and how fast it is back.

    bytes a token against the error of the gradient, k = 8 … 256, in four ways of keeping:
        topk_tail, sampled (draws alone; or half of them, beside the k / 2 likeliest),
        and the renormalised top-k of the field, which packtrain does not have
    on Zipf teachers over 131,072 tokens and on the herd (benchmarks/stored_words.py)

    the bias of `sampled`: its mean gradient over 4,096 draws of a token
    rates of one core: a teacher of 106 million parameters live, filling the store, reading it

Errors follow from seeds. Rates are in processor time, each the median of three turns, so that
neighbours on the machine matter little. The full run draws docs/teacher-store.png.
"""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from benchmarks.store_plot import Curve, draw
from benchmarks.stored_words import Words
from distill.filling import fill
from distill.identity import Identity
from distill.store import TargetStore, TokenRow
from distill.targets import TargetFormat, TeacherTargets, joined
from distill.teacher import Teacher
from ground.logprobs import head_weight
from ground.packing import hidden_states

WIDTHS = (8, 16, 32, 64, 128, 256)
ZIPFS = (1.0, 1.5)
BATCH, HERD_BATCH = 32, 1024
DRAWS = 4096
DEFAULT = TargetFormat("sampled", count=32, exact=32)
ROW_TOKENS, VOCABULARY = 256, 32_000
PLOT = ROOT / "docs" / "teacher-store.png"


def measure(quick: bool) -> Report:
    """Errors and bias of each teacher, then rates."""
    torch.set_num_threads(1)
    teachers: dict[str, Callable[[], Words]] = {
        f"Zipf {exponent}": lambda exponent=exponent: Words.zipf(exponent, BATCH)
        for exponent in ZIPFS
    }
    teachers["herd"] = lambda: Words.herd(HERD_BATCH)
    figures: list[Figure] = []
    curves: dict[str, list[Curve]] = {}
    for name, words_of in teachers.items():
        words = words_of()
        curves[name] = sweep(words, (64,) if quick else WIDTHS)
        figures += worth(name, curves[name])
        figures.append(bias(name, words, 512 if quick else DRAWS))
    figures += rates(2)
    figures.append(index_bytes())
    if not quick:
        draw(curves, PLOT)
    said = {name: [curve.as_json() for curve in each] for name, each in curves.items()}
    return Report(figures, {"errors": said})


def sweep(words: Words, widths: Sequence[int]) -> list[Curve]:
    """Errors of one token's gradient and of the batch's, by what is kept."""
    formats = {
        "topk_tail": [TargetFormat("topk_tail", width) for width in widths],
        "sampled, draws alone": [TargetFormat("sampled", width) for width in widths],
        "sampled, half of it the likeliest": [
            TargetFormat("sampled", width // 2, exact=width // 2) for width in widths
        ],
    }
    curves = [Curve("renormalised top-k", [], [], [])]
    for width in widths:
        size = TargetFormat("topk_tail", width).bytes_per_token(words.vocabulary)
        curves[0].add(size, words, words.renormalised(width))
    for name, each in formats.items():
        curve = Curve(name, [], [], [])
        for format in each:
            curve.add(format.bytes_per_token(words.vocabulary), words, words.stored(format))
        curves.append(curve)
    return curves


def worth(teacher: str, curves: Sequence[Curve]) -> list[Figure]:
    """At 64 outcomes, in each way of keeping."""
    figures = []
    for curve in curves:
        place = 0 if len(curve.sizes) == 1 else WIDTHS.index(64)
        for what, errors in (("token", curve.token_errors), ("batch", curve.batch_errors)):
            name = f"{teacher}: {curve.name}, error of a {what}"
            figures.append(Figure(name, errors[place], better="lower", tolerance=0.02))
    return figures


def bias(teacher: str, words: Words, draws: int) -> Figure:
    """How far the mean over many draws of one token is from the full gradient."""
    one = words.first(1)
    found = one.token_error(one.mean_of_draws(DEFAULT, draws))
    goal = 0.02 if draws == DRAWS else None
    return Figure(f"{teacher}: bias of sampled", found, goal=goal, better="lower", tolerance=0.05)


def rates(num_rows: int) -> list[Figure]:
    """Tokens a second of processor time: the teacher live, the store filled, the store read."""
    model, rows = _model(), _rows(num_rows)
    teacher = Teacher(model, DEFAULT, vocabulary=VOCABULARY, pass_tokens=2048)
    whose = Identity("teacher@0", "", "", VOCABULARY, str(DEFAULT))
    tokens = sum(len(row.places) for row in rows)
    live_rate = tokens / _seconds(lambda: _live(model, rows))
    with tempfile.TemporaryDirectory() as folder:
        stores = [TargetStore(Path(folder) / f"{turn}", whose, DEFAULT.kind) for turn in range(3)]
        turns = iter(stores)
        fill_rate = tokens / _seconds(lambda: fill(next(turns), rows, lambda: teacher))

        def reading() -> TeacherTargets:
            return joined([stores[0].read(row.key) for row in rows])

        read_rate, stored = tokens / _seconds(reading), stores[0].num_bytes / tokens
        held = sum(each.nbytes for each in reading().tensors if each is not None) / tokens
    return [
        Figure("live teacher", live_rate, "tokens/s"),
        Figure("filling", fill_rate, "tokens/s"),
        Figure("filling over live", fill_rate / live_rate, "x", tolerance=0.3),
        Figure("reading", read_rate, "tokens/s"),
        Figure("reading over live", read_rate / live_rate, "x", goal=20),
        Figure("stored", stored, "B/token", better="lower", tolerance=1),
        Figure("in memory, read", held, "B/token", better="lower", tolerance=1),
        Figure("in memory, live", VOCABULARY * 4, "B/token", better="lower"),
    ]


def _model() -> LlamaForCausalLM:
    """106 million parameters, drawn at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=ROW_TOKENS,
    )
    return LlamaForCausalLM(config)


def _rows(count: int) -> list[TokenRow]:
    """Rows of random tokens, of which all but the first are trained."""
    dice = torch.Generator().manual_seed(0)
    ids_RT = torch.randint(VOCABULARY, (count, ROW_TOKENS), generator=dice)
    trained = (False, *[True] * (ROW_TOKENS - 1))
    return [TokenRow(tuple(ids_T), trained) for ids_T in ids_RT.tolist()]


@torch.inference_mode()
def _live(model: LlamaForCausalLM, rows: Sequence[TokenRow]) -> None:
    """What a trainer asks of a teacher whose word is not kept: the log-probs of a pass."""
    ids_RT = torch.tensor([row.ids for row in rows])
    for hidden_TH in hidden_states(model, ids_RT, torch.ones_like(ids_RT)):
        (hidden_TH @ head_weight(model).T).log_softmax(-1)


def index_bytes(num_rows: int = 4096) -> Figure:
    """Memory that an open store takes for each row, whatever the row's length."""
    whose = Identity("teacher@0", "", "", 16, str(DEFAULT))
    format = TargetFormat("sampled", count=1, exact=1)
    said = format.make(torch.zeros(1, 16), torch.zeros(1, dtype=torch.long), torch.Generator())
    with tempfile.TemporaryDirectory() as folder:
        with TargetStore(Path(folder), whose, "sampled").writer() as writer:
            for index in range(num_rows):
                writer.insert(TokenRow((index, 0), (False, True)).key, said)
        tracemalloc.start()
        store = TargetStore(Path(folder), whose, "sampled")
        taken = tracemalloc.get_traced_memory()[0] / store.num_rows
        tracemalloc.stop()
    return Figure("open store", taken, "B/row", better="lower", tolerance=50)


def _seconds(work: Callable[[], object]) -> float:
    """Processor time, the median of three turns."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(max(time.process_time() - start, 1e-9))
    return median(times)


if __name__ == "__main__":
    sys.exit(run_benchmark("teacher_store", measure, seeds=(10, 15)))
