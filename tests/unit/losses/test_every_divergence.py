"""Every divergence against its definition in float64: plain and fused, from whole and from sparse teachers, in fp32 and bf16."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from divergence_cases import CASES, Case, through_softmax
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError
from kdtune.losses import (
    AdaptiveKL,
    DenseSignal,
    DivergenceLoss,
    HiddenSignal,
    KDLoss,
    SampledSignal,
    SampledTargets,
    TopKSignal,
    TopKTargets,
    check_divergence,
    value_and_gradient,
)
from kdtune.losses.divergences.adaptive_kl import head_of
from kdtune.losses.signal import Signal
from kdtune.losses.targets import Targets
from kdtune.models import OutputHead

K = 5
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_on_tail = pytest.mark.parametrize("case", [c for c in CASES if c.tail], ids=lambda case: case.name)
each_sampled = pytest.mark.parametrize("case", [c for c in CASES if c.sampled], ids=lambda case: case.name)


def logps(rows: int = 6, ids: int = 31, seed: int = 0, gap: float = 0.7) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities in float64; the models differ by about `gap` in a logit."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, rows, ids, generator=generator, dtype=torch.float64)
    return (2.0 * noise[0]).log_softmax(-1), (2.0 * noise[0] + gap * noise[1]).log_softmax(-1)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@each
def test_formula_and_autograd_equal_the_definition(case: Case) -> None:
    student, teacher = logps()
    free = student.clone().requires_grad_()
    exact = case.exact(free, teacher)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), free)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        s, t = student.to(dtype).requires_grad_(), teacher.to(dtype)
        plain = case.divergence(s, t)
        (by_autograd,) = torch.autograd.grad(plain.sum(), s)
        values, by_formula = value_and_gradient(case.divergence, s, t)
        assert plain.dtype == values.dtype == by_formula.dtype == dtype
        assert relative(plain.detach(), exact.detach()) < tolerance
        assert relative(values, exact.detach()) < tolerance
        assert relative(by_formula, by_autograd.double()) < tolerance
        assert relative(through_softmax(by_formula, s.detach()), exact_gradient) < tolerance


@pytest.mark.parametrize("case", [c for c in CASES if not c.has_constants], ids=lambda case: case.name)
def test_gradcheck(case: Case) -> None:
    student, teacher = logps(rows=2, ids=7)
    assert torch.autograd.gradcheck(lambda s: case.divergence(s.log_softmax(-1), teacher), student.requires_grad_())


@each
def test_half_precision_is_raised(case: Case) -> None:
    student, teacher = (x.bfloat16() for x in logps())
    found = case.divergence(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, case.divergence(student.float(), teacher.float()))


@each
def test_passes_the_check_of_a_component(case: Case) -> None:
    check_divergence(case.divergence)


# ---- The fused path: from hidden states and heads.


@dataclasses.dataclass
class Batch:
    hidden: Tensor
    head: OutputHead
    signal: Signal
    labels: Tensor
    student_logp: Callable[[Tensor, Tensor], Tensor]
    """From hidden states and weight in float64, of the valid tokens."""
    teacher_logp: Tensor
    """Of the valid tokens, in float64."""


def batch(dtype: torch.dtype, kind: str, ids: int = 61, seed: int = 0) -> Batch:
    """Ragged hidden states; a teacher by hidden states, logits, top k with tail, or draws."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, teacher_hidden = draw(3, 6, 16), draw(3, 6, 24)
    head, teacher_head = OutputHead(16, ids).to(dtype), OutputHead(24, ids).to(dtype)
    head.weight.data, teacher_head.weight.data = draw(ids, 16, std=0.4), draw(ids, 24, std=0.3)
    labels = torch.randint(ids, (3, 6), generator=generator)
    labels[0, 4:], labels[1, :2], labels[2, 1] = IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX
    valid = labels != IGNORE_INDEX
    all_teacher_logp = (teacher_hidden.double() @ teacher_head.weight.detach().double().T).log_softmax(-1)
    signal: Signal
    if kind == "top k":
        top = all_teacher_logp.to(torch.promote_types(dtype, torch.float32)).topk(K)
        signal = TopKSignal(top.indices, top.values, ids, outside="tail")
        all_teacher_logp = all_teacher_logp.scatter(-1, top.indices, top.values.double())
    elif kind == "logits":
        signal = DenseSignal(all_teacher_logp.to(torch.promote_types(dtype, torch.float32)))
    else:
        signal = HiddenSignal(teacher_hidden, teacher_head)
    return Batch(
        hidden.requires_grad_(),
        head,
        signal,
        labels,
        lambda h, w: (h[valid] @ w.T).log_softmax(-1),
        all_teacher_logp[valid],
    )


def assert_fused(
    case: Case, b: Batch, exact_of: Callable[[Tensor], Tensor], loss_fn: KDLoss, fp32_tolerance: float = 1e-5
) -> None:
    """Value and gradients of the fused loss against those of a function of the student's log-probabilities in float64."""
    loss, parts = loss_fn(b.hidden, b.head, b.signal, b.labels)
    found = torch.autograd.grad(loss, (b.hidden, b.head.weight))
    inputs = tuple(x.detach().double().requires_grad_() for x in (b.hidden, b.head.weight))
    exact = exact_of(b.student_logp(*inputs))
    is_half = b.hidden.dtype == torch.bfloat16
    tolerance = {torch.float64: 1e-10, torch.float32: fp32_tolerance, torch.bfloat16: 5e-3}[b.hidden.dtype]
    assert float(parts["kd_loss"]) == pytest.approx(exact.item(), rel=1e-4 if is_half else tolerance)
    for one, wanted in zip(found, torch.autograd.grad(exact, inputs), strict=True):
        assert one.dtype == b.hidden.dtype
        assert relative(one, wanted) < tolerance


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("kind", ["hidden", "logits"])
@each
def test_fused_with_a_whole_teacher(case: Case, kind: str, dtype: torch.dtype) -> None:
    b = batch(dtype, kind)
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4)
    assert_fused(case, b, lambda logq: case.exact(logq, b.teacher_logp).sum(), loss_fn)


@each
def test_fused_with_bf16_logits(case: Case) -> None:
    """To 1 %; to 3 % where a slope jumps at p = q. Seed 1: in it no two of the teacher's largest logits round to the same."""
    b = batch(torch.bfloat16, "hidden", seed=1)
    loss, _ = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4, logits_dtype=torch.bfloat16)(
        b.hidden, b.head, b.signal, b.labels
    )
    found = torch.autograd.grad(loss, (b.hidden, b.head.weight))
    inputs = tuple(x.detach().double().requires_grad_() for x in (b.hidden, b.head.weight))
    exact = case.exact(b.student_logp(*inputs), b.teacher_logp).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for one, wanted in zip(found, torch.autograd.grad(exact, inputs), strict=True):
        assert relative(one, wanted) < (0.03 if case.name == "total variation" else 0.01)


QUICK = ("reverse", "jsd", "total variation")
LARGE = [
    pytest.param(
        case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow("in float64 over 128,256 ids")
    )
    for case in CASES
]


@pytest.mark.parametrize("case", LARGE)
def test_fused_over_the_vocabulary_of_llama_3(case: Case) -> None:
    b = batch(torch.float32, "hidden", ids=128_256)
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=8)
    assert_fused(case, b, lambda logq: case.exact(logq, b.teacher_logp).sum(), loss_fn)


def merged(logp: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of some ids, and of all others together, as logarithms."""
    p = logp.exp()
    kept = p.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1).log()


@DTYPES
@pytest.mark.parametrize("kind", ["hidden", "top k"])
@each_on_tail
def test_fused_with_top_k_and_a_tail(case: Case, kind: str, dtype: torch.dtype) -> None:
    """A live teacher that is cut to its k ids, and stored ones, both equal the divergence after all other ids are merged."""
    b = batch(dtype, kind)
    ids = b.teacher_logp.topk(K).indices
    targets = TopKTargets(K) if kind == "hidden" else None
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4, teacher_targets=targets)
    exact = merged(b.teacher_logp, ids)
    assert_fused(case, b, lambda logq: case.exact(merged(logq, ids), exact).sum(), loss_fn)


@DTYPES
@pytest.mark.parametrize("case", [c for c in CASES if c.renormalized], ids=lambda case: case.name)
def test_fused_with_renormalized_top_k(case: Case, dtype: torch.dtype) -> None:
    b = batch(dtype, "hidden")
    ids = b.teacher_logp.topk(K).indices
    kept = torch.zeros_like(b.teacher_logp).scatter(-1, ids, b.teacher_logp.gather(-1, ids).exp())
    p = (kept + 1e-300).log()  # the definitions take logarithms of all of them
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4, teacher_targets=TopKTargets(K, "renormalize"))
    assert_fused(case, b, lambda logq: case.exact(logq, p).sum(), loss_fn)


@pytest.mark.parametrize("kind", ["hidden", "top k"])
@each
def test_fused_with_top_k_alone(case: Case, kind: str) -> None:
    """Both distributions over the teacher's k ids, the student's renormalized too: defined for every divergence."""
    b = batch(torch.float32, kind)
    if isinstance(b.signal, TopKSignal):
        b.signal = dataclasses.replace(b.signal, outside="ignore", log_tail_BS=None)
    ids = b.teacher_logp.topk(K).indices
    targets = TopKTargets(K, "ignore") if kind == "hidden" else None
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4, teacher_targets=targets)
    p = b.teacher_logp.gather(-1, ids).log_softmax(-1)
    assert_fused(case, b, lambda logq: case.exact(logq.gather(-1, ids).log_softmax(-1), p).sum(), loss_fn)


def drawn(b: Batch, samples: int, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and weights for all positions of a batch."""
    r = (exponent * b.teacher_logp).softmax(-1)
    ids = torch.multinomial(r, samples, replacement=True, generator=torch.Generator().manual_seed(1))
    return ids, b.teacher_logp.gather(-1, ids), 1 / (samples * r.gather(-1, ids))


@DTYPES
@each_sampled
def test_fused_with_draws(case: Case, dtype: torch.dtype) -> None:
    """Each drawn id's term, times its weight."""
    b = batch(dtype, "hidden")
    ids, logp, weights = drawn(b, 9, 0.8)
    valid = b.labels != IGNORE_INDEX
    placed = []
    for x in (ids, logp, weights):
        whole = torch.zeros(*b.labels.shape, 9, dtype=x.dtype)
        whole[valid] = x
        placed.append(whole if x is ids else whole.to(torch.promote_types(dtype, torch.float32)))
    b.signal = SampledSignal(*placed, vocab_size=61)
    logp, weights = (x[valid].double() for x in placed[1:])

    def exact(logq: Tensor) -> Tensor:
        # A definition of a distribution over one id is that id's term.
        q, p = (x.exp().reshape(-1, 1) for x in (logq.gather(-1, ids), logp))
        return (case.definition(q, p) * weights.flatten()).sum()

    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=4)
    assert_fused(case, b, exact, loss_fn)
    # What the teacher finds most likely is not known from draws.
    assert "agreement" not in loss_fn(b.hidden, b.head, b.signal, b.labels)[1]


@each_sampled
def test_a_live_teacher_is_sampled_by_its_own_distribution(case: Case) -> None:
    """The same draws, made here by the generator that the loss draws by."""
    b = batch(torch.float64, "logits")
    torch.manual_seed(5)
    rows = SampledTargets(7, exponent=0.9).of(b.teacher_logp)
    torch.manual_seed(5)
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, teacher_targets=SampledTargets(7, exponent=0.9))
    r = (0.9 * b.teacher_logp).softmax(-1).gather(-1, rows.ids_RK)

    def exact(logq: Tensor) -> Tensor:
        q, p = (x.gather(-1, rows.ids_RK).exp().reshape(-1, 1) for x in (logq, b.teacher_logp))
        return (case.definition(q, p) / (7 * r.flatten())).sum()

    assert_fused(case, b, exact, loss_fn)


@each
def test_what_is_not_defined_on_sparse_targets_is_refused(case: Case) -> None:
    """With a message that names both; what is defined there is not refused."""
    for targets, is_defined in (
        (TopKTargets(K), case.tail),
        (SampledTargets(K), case.sampled),
        (TopKTargets(K, "renormalize"), case.renormalized),
        (TopKTargets(K, "ignore"), True),
    ):
        if is_defined:
            KDLoss(case.divergence, teacher_targets=targets)
        else:
            with pytest.raises(
                ConfigError, match=rf"^teacher_targets: {type(targets).__name__} cannot serve .*; allowed are "
            ):
                KDLoss(case.divergence, teacher_targets=targets)


@pytest.mark.parametrize("kind", ["tail", "sampled"])
def test_a_teacher_of_ones_own_may_not_give_what_the_divergence_cannot_use(kind: str) -> None:
    b = batch(torch.float32, "top k")
    assert isinstance(b.signal, TopKSignal)
    if kind == "sampled":
        b.signal = SampledSignal(b.signal.ids_BSK, b.signal.logp_BSK, torch.ones_like(b.signal.logp_BSK), 61)
    with pytest.raises(ConfigError, match="Rows cannot serve adaptive KL .*; allowed are "):
        KDLoss(AdaptiveKL())(b.hidden, b.head, b.signal, b.labels)


# ---- Edges.


@each
def test_ids_that_both_models_exclude_change_nothing(case: Case) -> None:
    student, teacher = logps(ids=9)
    excluded = torch.full((6, 2), -torch.inf, dtype=torch.float64)
    masked = torch.cat([student, excluded], dim=1).requires_grad_(), torch.cat([teacher, excluded], dim=1)
    values, gradient = value_and_gradient(case.divergence, *masked)
    expected, expected_gradient = value_and_gradient(case.divergence, student, teacher)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient[:, :9], expected_gradient)
    assert gradient[:, 9:].abs().max() == 0
    plain = case.divergence(*masked)
    torch.testing.assert_close(plain.detach(), expected)
    (by_autograd,) = torch.autograd.grad(plain.sum(), masked[0])
    torch.testing.assert_close(by_autograd, gradient)


@each
@pytest.mark.parametrize("of_teacher", [True, False])
def test_an_id_that_one_model_excludes_has_its_limit(case: Case, of_teacher: bool) -> None:
    """The value with probability 0 is the one that ever smaller probabilities lead to, or it is infinite as they are."""
    student, teacher = logps(rows=4, ids=9)

    def value(logit: float) -> Tensor:
        pair = [student.clone(), teacher.clone()]
        pair[int(of_teacher)][:, 3] = logit
        return case.divergence(*(x.log_softmax(-1) for x in pair))

    at_zero = value(-torch.inf)
    assert not at_zero.isnan().any()
    finite = at_zero.isfinite()
    torch.testing.assert_close(at_zero[finite], value(-1e4)[finite], rtol=1e-6, atol=1e-6)
    assert (value(-1e4) > 10 * value(-100.0))[~finite].all()


@each
def test_one_token_trains_at_its_position(case: Case) -> None:
    """Three positions of which one has a target: its value and gradient by hand, and no gradient elsewhere."""
    b = batch(torch.float64, "logits")
    hidden, labels = b.hidden.detach()[:1, :3].requires_grad_(), torch.full((1, 3), IGNORE_INDEX)
    labels[0, 1] = 7
    teacher = torch.randn(1, 3, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss, _ = KDLoss(case.divergence, kd_ratio=0.75)(hidden, b.head, DenseSignal(teacher), labels)
    free = hidden.detach()[0, 1].clone().requires_grad_()
    logq = (b.head.weight.detach() @ free).log_softmax(-1)
    exact = -0.25 * logq[7] + 0.75 * case.exact(logq[None], teacher[0, 1][None].log_softmax(-1)).squeeze(0)
    torch.testing.assert_close(loss.detach(), exact.detach())
    (found,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(exact, free)
    torch.testing.assert_close(found[0, 1], wanted)
    assert found[0, 0].abs().max() == found[0, 2].abs().max() == 0


@each
def test_plain_logits_equal_the_fused_path(case: Case) -> None:
    b = batch(torch.float64, "hidden")
    assert isinstance(b.signal, HiddenSignal)
    teacher_logits = b.signal.output(b.signal.hidden_BSD)
    plain = DivergenceLoss(case.divergence)(b.head(b.hidden), teacher_logits, b.labels)
    fused, _ = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=100)(b.hidden, b.head, b.signal, b.labels)
    fused = fused / (b.labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(plain, fused)
    (one,), (other,) = torch.autograd.grad(plain, b.hidden), torch.autograd.grad(fused, b.hidden)
    torch.testing.assert_close(one, other)


@each
def test_nothing_to_train_is_zero(case: Case) -> None:
    b = batch(torch.float32, "hidden")
    loss, _ = KDLoss(case.divergence)(b.hidden, b.head, b.signal, torch.full_like(b.labels, IGNORE_INDEX))
    (gradient,) = torch.autograd.grad(loss, b.hidden)
    assert loss.item() == gradient.abs().max().item() == 0


@each
def test_weights_multiply_each_token(case: Case) -> None:
    b = batch(torch.float64, "hidden")
    targets = Targets.from_labels(b.labels)
    weights = torch.linspace(0, 2, len(targets), dtype=torch.float64)
    of_class = torch.linspace(-1, 3, len(targets), dtype=torch.float64)
    weighted = dataclasses.replace(targets, weights_N=weights, class_weights_N=of_class)
    loss, parts = KDLoss(case.divergence, kd_ratio=0.5, chunk_size=4)(b.hidden, b.head, b.signal, weighted)
    found = torch.autograd.grad(loss, (b.hidden, b.head.weight))
    inputs = tuple(x.detach().requires_grad_() for x in (b.hidden, b.head.weight))
    logq = b.student_logp(*inputs)
    ce = -(weights * of_class * logq.gather(1, targets.labels_N[:, None]).squeeze(1)).sum()
    kd = (weights * case.exact(logq, b.teacher_logp)).sum()
    torch.testing.assert_close(loss.detach(), (0.5 * ce + 0.5 * kd).detach())
    assert float(parts["kd_loss"]) == pytest.approx(kd.item())
    assert float(parts["class_loss"]) == pytest.approx(ce.item())
    for one, wanted in zip(found, torch.autograd.grad(0.5 * ce + 0.5 * kd, inputs), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(50, 997), (2, 128_256)])
def test_the_head_of_the_teacher_equals_that_of_a_sort(
    mass: float, scale: float, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    p = (
        (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        .softmax(-1)
        .to(dtype)
    )
    ordered, ids = p.double().sort(-1, descending=True)
    expected = (ordered.cumsum(-1) <= mass).index_fill(-1, torch.tensor([0]), True)
    found = head_of(p, mass).gather(-1, ids)
    # Where the sum of the head comes to the mass itself to rounding, either is right.
    unclear = ((ordered.cumsum(-1) - mass).abs() < 1e-12).any(-1)
    assert unclear.sum() <= 1
    assert torch.equal(found[~unclear], expected[~unclear])


def test_ids_of_one_probability_are_together_in_the_tail() -> None:
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    assert head_of(p, 0.6).tolist() == [[True, False, False, False]]
    assert head_of(torch.full((1, 4), 0.25), 0.1).all()


@each_sampled
def test_draws_for_a_student_with_more_rows_are_over_the_shared_ids(case: Case) -> None:
    """Ids that the teacher lacks are never drawn: the mean over many draws is the loss of all shared ids, renormalized, or of all
    ids where the others add nothing to it.
    """
    b = batch(torch.float64, "logits")
    teacher = b.teacher_logp[:, :50].log_softmax(-1)
    free = b.student_logp(b.hidden.detach(), b.head.weight.detach())
    torch.manual_seed(0)
    loss_fn = KDLoss(case.divergence, kd_ratio=1.0, teacher_targets=SampledTargets(40_000))
    logits = torch.zeros(*b.labels.shape, 50, dtype=torch.float64)
    logits[b.labels != IGNORE_INDEX] = teacher
    labels = b.labels.clamp(max=49)
    _, parts = loss_fn(b.hidden, b.head, DenseSignal(logits), labels)
    over_all = case.name in ("forward", "skew forward")
    q = free if over_all else free[:, :50].log_softmax(-1)
    exact = case.divergence(q[:, :50], teacher).sum().item()
    assert float(parts["kd_loss"]) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_one_draw_is_that_of_multinomial(exponent: float) -> None:
    """Whose own draw of one sample reads a value on the host, so that the loss draws it otherwise."""
    logp = logps(rows=200, ids=31)[1].float()
    torch.manual_seed(0)
    rows = SampledTargets(1, exponent).of(logp)
    torch.manual_seed(0)
    expected = (exponent * logp).softmax(-1).multinomial(1, replacement=True)
    assert torch.equal(rows.ids_RK, expected) and len(expected.unique()) > 10
