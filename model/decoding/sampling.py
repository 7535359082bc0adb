"""Drawing the next token: settings of one row, and a sampler of many rows that each have their own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import ModelError

GROUP = 8  # logits of a group in likeliest()
SMALLEST = 1e-30  # temperature or top_p; dividing a logit by less overflows float32


@dataclass(frozen=True)
class Sampling:
    """Settings of one completion. Applied in this order: penalty, temperature, top_k, top_p, min_p.

    The same prompt, settings and seed give the same completion, whatever is generated beside it, as far as the logits
    are the same: GEMMs of other sizes round differently, which can decide between tokens of almost equal logits.
    """

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = 50  # only the k likeliest
    top_p: float | None = None  # only the likeliest whose probabilities sum to p
    min_p: float | None = None  # only those at least min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # > 1: tokens of the prompt or the completion become less likely
    seed: int = 0
    max_tokens: int = 256  # of the completion, tool output included
    stop: tuple[str, ...] = ()  # texts that end the completion

    def check(self) -> None:
        """Raises ModelError naming the first value that cannot work."""
        for name, good in (
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty > 0),
            ("max_tokens", self.max_tokens >= 1),
            ("stop", all(self.stop)),
        ):
            if not good:
                raise ModelError(f"sampling: {name} is {getattr(self, name)!r}, which cannot work")


def uniforms(seed: int, sample: int, count: int) -> Tensor:
    """(count,) float32 in [0, 1): the randomness of one completion, a function of its seed and sample number alone."""
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The values and places (N, count) of the largest of logits (N, vocab), in descending order.

    On CPUs, topk of a large part of the vocabulary takes up to twice as long as going by groups first: the largest are
    in groups that have one of the largest maxima. Which way is taken depends on the sizes alone, since the two may
    differ in which of equal logits they pick.
    """
    rows, size = logits.shape
    worth = count >= 2 * GROUP and 2 * GROUP * count <= size <= 64 * count and size % GROUP == 0
    if not (worth and logits.device.type == "cpu"):
        return logits.topk(count)
    groups = logits.unflatten(1, (GROUP, -1))
    best = groups.amax(1).topk(count, sorted=False).indices
    among = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).view(rows, GROUP * count)
    values, places = among.topk(count)
    return values, best.gather(1, places % count) + places // count * (size // GROUP)


Cap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """Which kernels a draw calls: whatever of the current rows' settings matters for that."""

    all_greedy: bool
    any_greedy: bool
    all_free: bool
    any_free: bool
    any_temperature: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool
    widths: tuple[int, ...]  # top_k of the rows that have limits


class Sampler:
    """Draws the next token of each of at most `rows` rows; a row's settings and randomness are its own.

    Rows are always listed in ascending order. A token is where the row's next uniform number falls in the cumulative
    distribution, so that all rows are drawn at once and no row's draw affects another's. Tensors are written to and
    never replaced: draws of as many rows by the same plan make the same calls on the same memory, as CUDA graphs need.
    """

    def __init__(self, rows: int, max_tokens: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.all_uniforms = torch.zeros(rows, max_tokens, device=device)
        self.all_drawn = torch.zeros(rows, dtype=torch.long, device=device)
        self.all_seen: Tensor | None = None  # (rows, vocab) bool, once a row has a repetition penalty
        self.numbers = torch.ones(5, rows, 1, device=device)
        self.flags = torch.zeros(2, rows, dtype=torch.bool, device=device)
        self.exact = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.restart([Sampling(temperature=0.0)] * rows)

    def restart(self, settings: list[Sampling]) -> None:
        """Start with as many rows as there are settings."""
        rows = len(settings)
        self.settings = settings
        self.uniforms, self.drawn = self.all_uniforms[:rows], self.all_drawn[:rows]
        self.seen = None if self.all_seen is None else self.all_seen[:rows]
        self.greedy, self.free = self.flags[:, :rows]
        self.temperature, self.top_p, self.min_p, self.penalty, self.kept = self.numbers[:, :rows]
        self.ready()

    def assign(self, row: int, sampling: Sampling, sample: int, prompt: list[int]) -> None:
        """Start a completion in row `row`. Call ready() after the last assign."""
        self.settings[row] = sampling
        if sampling.temperature > 0:
            drawn = uniforms(sampling.seed, sample, min(sampling.max_tokens, self.uniforms.size(1)))
            self.uniforms[row, : len(drawn)] = drawn
        self.drawn[row] = 0
        if sampling.repetition_penalty != 1.0 and self.all_seen is None:
            shape = len(self.all_drawn), self.vocab_size
            self.all_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.seen = self.all_seen[: len(self.settings)]
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, torch.tensor(prompt, device=self.device)] = True

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        places = torch.tensor(rows, device=self.device)
        for kept in (self.uniforms, self.drawn, self.seen):
            if kept is not None:
                kept[: len(rows)] = kept[places]
        self.restart([self.settings[row] for row in rows])

    def ready(self) -> None:
        """Copy the rows' settings to tensors, and plan the draws."""
        rows = self.settings
        greedy = [row.temperature == 0 for row in rows]
        widths = [min(row.top_k or self.vocab_size, self.vocab_size) for row in rows]
        # Free rows may draw any token.
        free = [
            row.temperature > 0 and width == self.vocab_size and not (row.top_p or row.min_p)
            for row, width in zip(rows, widths)
        ]
        limited = {width for width, a, b in zip(widths, free, greedy) if not (a or b)} or {1}
        self.plan = Plan(
            all_greedy=all(greedy),
            any_greedy=any(greedy),
            all_free=all(a or b for a, b in zip(free, greedy)),
            any_free=any(free),
            any_temperature=any(row.temperature not in (0.0, 1.0) for row in rows),
            any_top_p=any(row.top_p is not None for row in rows),
            any_min_p=any(row.min_p for row in rows),
            any_penalty=any(row.repetition_penalty != 1.0 for row in rows),
            widths=tuple(sorted(limited)),
        )
        self.flags[:, : len(rows)] = torch.tensor([greedy, free])
        numbers = [
            [max(row.temperature, SMALLEST) if row.temperature else 1.0 for row in rows],
            [max(row.top_p, SMALLEST) if row.top_p else 2.0 for row in rows],
            [row.min_p or 0.0 for row in rows],
            [row.repetition_penalty for row in rows],
            widths,
        ]
        self.numbers[:, : len(rows), 0] = torch.tensor(numbers)

    def cool(self, logits: Tensor, rows: list[int]) -> Tensor:
        """logits (N, vocab) of these rows at their temperatures (those of greedy rows as they are)."""
        return logits / self._of(rows, self.temperature) if self.plan.any_temperature else logits

    def draw(self, logits: Tensor, rows: list[int], cap: Cap | None = None) -> Tensor:
        """(N,) int64 from the logits (N, vocab) float32 of these rows, which stay unchanged. Call saw() afterwards.

        cap: still to be applied to the logits. It keeps their order, so that most of them never need it.
        """
        if self.plan.any_penalty:
            logits, cap = self._penalise(logits, rows, cap)
        if self.plan.all_greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = self._sample(logits, rows, cap)
            if self.plan.any_greedy:
                tokens = torch.where(self._of(rows, self.greedy), logits.argmax(-1), tokens)
        if len(rows) == len(self.settings):
            self.drawn += 1
        else:
            self.drawn[torch.tensor(rows, device=self.device)] += 1
        return tokens

    def _penalise(self, logits: Tensor, rows: list[int], cap: Cap | None) -> tuple[Tensor, Cap | None]:
        """Capped and penalised logits of rows with a penalty, which changes their order; the others stay uncapped."""
        assert self.seen is not None  # since a row that has a penalty was assigned
        penalty, said = self._of(rows, self.penalty), logits if cap is None else cap(logits)
        penalised = torch.where(said < 0, said * penalty, said / penalty)
        mine = penalty != 1.0
        logits = torch.where(mine, torch.where(self._of(rows, self.seen), penalised, said), logits)
        return logits, None if cap is None else lambda some: torch.where(mine, some, cap(some))

    def saw(self, rows: list[int], tokens: list[int]) -> None:
        """Note that these rows continued with these tokens, drawn or forced, for their repetition penalties."""
        if self.seen is not None:
            places = torch.tensor([rows, tokens], device=self.device)
            self.seen[places[0], places[1]] = True

    def _of(self, rows: list[int], setting: Tensor) -> Tensor:
        """The values of a setting for these rows."""
        return setting if len(rows) == len(self.settings) else setting[torch.tensor(rows, device=self.device)]

    def _sample(self, logits: Tensor, rows: list[int], cap: Cap | None) -> Tensor:
        """A row's settings alone decide how it is drawn: if its neighbours' did, they would change its tokens."""
        if self.plan.all_free:
            return self._sample_free(logits, rows, cap)
        tokens = self._sample_limited(logits, rows, cap)
        if self.plan.any_free:
            tokens = torch.where(self._of(rows, self.free), self._sample_free(logits, rows, cap), tokens)
        return tokens

    def _sample_free(self, logits: Tensor, rows: list[int], cap: Cap | None) -> Tensor:
        """Draw from the whole vocabulary, in its own order: nothing needs sorting."""
        weights = self.cool(logits if cap is None else cap(logits), rows).softmax(-1)
        return self._place(weights.cumsum(-1, dtype=self.exact), rows)[:, 0]

    def _sample_limited(self, logits: Tensor, rows: list[int], cap: Cap | None) -> Tensor:
        """Draw width by width: which of equal logits (many, in 16 bits) comes first may depend on the width."""
        first, *others = self.plan.widths
        tokens = self._sample_likeliest(first, logits, rows, cap)
        for width in others:
            alike = self._of(rows, self.kept)[:, 0] == width
            tokens = torch.where(alike, self._sample_likeliest(width, logits, rows, cap), tokens)
        return tokens

    def _sample_likeliest(self, width: int, logits: Tensor, rows: list[int], cap: Cap | None) -> Tensor:
        logits, ids = likeliest(logits, width)
        logits = self.cool(logits if cap is None else cap(logits), rows)
        weights = logits.softmax(-1)
        if self.plan.any_top_p:
            past = weights.cumsum(-1) - weights >= self._of(rows, self.top_p)
            weights = weights.masked_fill(past, 0.0)
        if self.plan.any_min_p:
            weights = weights.masked_fill(weights < self._of(rows, self.min_p) * weights[:, :1], 0.0)
        return ids.gather(1, self._place(weights.cumsum(-1), rows))[:, 0]

    def _place(self, reached: Tensor, rows: list[int]) -> Tensor:
        """(N, 1): where each row's next uniform number falls in its cumulative weights `reached` (N, width)."""
        column = self._of(rows, self.drawn)[:, None].clamp(max=self.uniforms.size(1) - 1)
        target = self._of(rows, self.uniforms).gather(1, column) * reached[:, -1:]
        # A uniform number is below 1, so only NaN falls past the last weight.
        return torch.searchsorted(reached, target, right=True).clamp_(max=reached.size(1) - 1)
