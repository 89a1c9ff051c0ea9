"""The loss against NumPy, what its mask keeps out, and accumulation against the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpu_stack.data.pipeline import eval_batches, train_iterator
from tpu_stack.models.abstract import map_specs
from tpu_stack.models.decoder import forward, init_params
from tpu_stack.sharding.mesh import batch_sharding
from tpu_stack.training.evaluate import Evaluator
from tpu_stack.training.losses import NextTokenLoss, negative_log_likelihood
from tpu_stack.training.step import TrainState, make_train_step


@pytest.fixture(scope="module")
def params(bench):
    generator = np.random.default_rng(0)

    def draw(spec):
        if spec.contract_axis is None:
            return np.ones(spec.shape, np.float32)
        return (0.2 * generator.standard_normal(spec.shape)).astype(np.float32)

    return map_specs(bench.model, draw)


@pytest.fixture(scope="module")
def batch(bench):
    """A real batch: several documents a row, so some positions carry no loss."""
    found = next(train_iterator(bench.corpus, bench.data))
    assert 0 < found["loss_mask"].sum() < found["loss_mask"].size
    assert found["segment_ids"].max() > 1
    return found


@pytest.fixture(scope="module")
def losses(bench):
    """`losses(params, batch)`: summed loss and labels, compiled once."""
    loss, key = NextTokenLoss(bench.model), jax.random.key(0)
    return jax.jit(lambda p, batch: (loss(p, (), batch, key)[0], loss.denominator(batch)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_negative_log_likelihood():
    logits = 30 * np.random.default_rng(1).standard_normal((2, 3, 11)).astype(np.float32)
    targets = np.array([[0, 10, 5], [3, 3, 7]])
    wanted = -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    found = negative_log_likelihood(jnp.asarray(logits), jnp.asarray(targets))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)  # logits of 100 in float32
    low = negative_log_likelihood(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(targets))
    assert low.dtype == jnp.float32  # widened before the softmax, not after


def test_loss_is_the_masked_sum(bench, params, batch, losses):
    """NumPy's cross-entropy of the model's logits, summed where the mask is set."""
    fields = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    logits = np.asarray(forward(bench.model, params, *fields))
    each = -np.take_along_axis(log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    total, tokens = losses(params, batch)
    assert int(tokens) == batch["loss_mask"].sum()
    np.testing.assert_allclose(total, each[batch["loss_mask"]].sum(), rtol=1e-5)


def test_masked_targets_and_padding_are_not_read(bench, params, batch, losses):
    """Targets without a label may be anything; rows of padding add nothing at all."""
    total, tokens = losses(params, batch)
    changed = dict(batch, targets=np.where(batch["loss_mask"], batch["targets"], 63))
    np.testing.assert_array_equal(losses(params, changed)[0], total)
    padded = {name: array.copy() for name, array in batch.items()}
    for array in padded.values():
        array[4:] = 0
    half, half_tokens = losses(params, padded)
    assert int(half_tokens) == batch["loss_mask"][:4].sum() < tokens
    first = {name: np.concatenate([array[:4]] * 2) for name, array in batch.items()}
    np.testing.assert_allclose(half, float(losses(params, first)[0]) / 2, rtol=1e-6)


def test_accumulation_is_the_whole_batch(bench, params, batch, quick_options):
    """Two and four micro-batches, the last ones half padding, give the gradient of the whole batch.

    A mean of means would not: micro-batches with fewer labels would weigh too much. Plain SGD at
    rate 1 makes the change of the parameters the gradient itself.
    """
    uneven = {name: array.copy() for name, array in batch.items()}
    for array in uneven.values():
        array[5:] = 0
    sgd = optax.sgd(1.0)
    state = TrainState.first(params, sgd.init(params), jax.random.key(0))

    def after(accumulate: int):
        step = make_train_step(NextTokenLoss(bench.model), sgd, accumulate)
        new, metrics = jax.jit(step, compiler_options=quick_options)(state, (), uneven)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, new.params, params), metrics, new

    grads, metrics, new = after(1)
    assert int(new.step) == 1
    np.testing.assert_allclose(
        metrics["grad_norm"], np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads))), rtol=1e-4
    )
    for accumulate in (2, 4):
        found, found_metrics, _ = after(accumulate)
        np.testing.assert_allclose(found_metrics["loss"], metrics["loss"], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
            # Gradients near 1e-2 read off parameters near 1: float32 leaves 1e-7 of noise.
            np.testing.assert_allclose(a, b, atol=3e-6)


def test_a_batch_without_labels_is_no_division_by_zero(bench, params, batch, quick_options):
    sgd = optax.sgd(1.0)
    step = make_train_step(NextTokenLoss(bench.model), sgd)
    state = TrainState.first(params, sgd.init(params), jax.random.key(0))
    empty = dict(batch, loss_mask=np.zeros_like(batch["loss_mask"]))
    new, metrics = jax.jit(step, compiler_options=quick_options)(state, (), empty)
    assert float(metrics["loss"]) == 0.0
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_covers_the_whole_split(bench, params, losses):
    """Every labelled token of the validation split once, all alike; bits per byte by formula."""
    job = bench.job("data=1")
    evaluator = Evaluator(
        bench.model, dtype="float32", batch=batch_sharding(job.profile.rules, job.mesh)
    )
    stream = bench.corpus.val
    found = evaluator.run(params, eval_batches(bench.corpus, bench.data), stream)
    parts = [losses(params, batch) for batch in eval_batches(bench.corpus, bench.data)]
    total, tokens = sum(float(a) for a, _ in parts), sum(int(n) for _, n in parts)
    assert found.tokens == tokens == stream.predicted_tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(
        total / np.log(2) / stream.predicted_bytes, rel=1e-5
    )
    one = evaluator.run(params, eval_batches(bench.corpus, bench.data), stream, limit=1)
    assert one.tokens == int(parts[0][1])
    assert one.bits_per_byte is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mixture_adds_its_balance_loss(bench, batch, quick_options, accumulate):
    """The mean over micro-batches of the decoder's own `aux`, beside the loss and not in it; the
    step's gradient is that of their sum, written out."""
    config = bench.model.replace(
        n_layers=1, n_experts=4, experts_per_token=2, balance_loss=0.5, d_ff=16
    )
    loss, sgd = NextTokenLoss(config), optax.sgd(1.0)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    tokens = batch["loss_mask"].sum()
    parts = [
        {name: array[rows] for name, array in batch.items()}
        for rows in np.split(np.arange(8), accumulate)
    ]

    def objective(params):
        found = [loss.summed(params, part) for part in parts]
        balance = 0.5 * sum(aux["balance_loss"] for _, aux in found) / accumulate
        mean = sum(total for total, _ in found) / tokens
        return mean + balance, (mean, balance)

    with_gradient = jax.jit(
        jax.value_and_grad(objective, has_aux=True), compiler_options=quick_options
    )
    (_, (mean, balance)), grads = with_gradient(params)
    assert float(balance) >= 0.5 * 2  # k at the least
    state = TrainState.first(params, sgd.init(params), jax.random.key(0))
    step = jax.jit(make_train_step(loss, sgd, accumulate), compiler_options=quick_options)
    new, metrics = step(state, (), batch)
    np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-6)
    np.testing.assert_allclose(metrics["balance_loss"], balance, rtol=1e-6)
    for after, before, grad in zip(*map(jax.tree.leaves, (new.params, params, grads)), strict=True):
        # Gradients near 1e-2 read off parameters near 1: float32 leaves 1e-7 of noise.
        np.testing.assert_allclose(np.asarray(before) - after, grad, atol=3e-6)
