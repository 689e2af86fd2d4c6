"""The training loop on a small dense network."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from samples import pictures

import lance_jax
from lance_jax import checkpoint, devices, loop
from lance_jax.features import Features
from tests.helpers import two_devices

SETTINGS = {
    "seed": 0,
    "batch_size": 4,
    "momentum": 0.9,
    "clip": 2.0,
    "log_every": 2,
    "checkpoint_every": 2,
}
STEPS = 5  # an epoch: windows of 2, 2 and 1


def apply_fn(params, x):
    x = x.reshape(len(x), -1)[:, :6]  # of pictures, the first pixels
    hidden = jax.nn.relu(x @ params["body"]["kernel"] + params["body"]["bias"])
    return hidden @ params["head"]["kernel"]


def initial():
    rng = np.random.default_rng(0)
    params = {
        "body": {"kernel": rng.normal(size=(6, 8)), "bias": rng.normal(size=8)},
        "head": {"kernel": rng.normal(size=(8, 3))},
    }
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def examples(views=1):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(views, 22, 6)).astype(np.float32)
    return Features(inputs, rng.integers(0, 3, 22).astype(np.int32))


def calibrate():
    batches = [jnp.asarray(examples().inputs[0, :4])]
    return lance_jax.calibrate(apply_fn, initial(), batches, select="body", core_dtype="int8")


def fit(
    directory, data=None, calibrate=calibrate, trainable=None, rate=0.1, epochs=3, micro_batch=4,
    apply=apply_fn, criterion=loop.cross_entropy, transform=None, dropout=False, **settings,
):  # fmt: skip
    config = ml_collections.ConfigDict({**SETTINGS, **settings})
    return loop.fit(
        loop.loss_of(apply, criterion=criterion),
        initial(),
        examples() if data is None else data,
        config,
        epochs=epochs,
        learning_rate=rate,
        field="learning_rate",
        trainable=trainable,
        calibrate=calibrate,
        directory=directory,
        micro_batch=micro_batch,
        transform=transform,
        dropout=dropout,
    )


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "step_seconds"} for line in lines]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_plain_training_is_sgd_with_clipping_momentum_and_a_cosine(tmp_path, exact_products):
    """Two steps by hand, in float64."""
    data = examples()
    found = fit(tmp_path, calibrate=None, batch_size=11, epochs=1, clip=0.5)
    order = np.random.default_rng((0, 0)).permutation(22)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), initial())
    velocity = jax.tree.map(np.zeros_like, params)
    for step in range(2):
        chosen = order[11 * step : 11 * (step + 1)]
        x, y = data.inputs[0, chosen].astype(np.float64), data.labels[chosen]
        hidden = np.maximum(x @ params["body"]["kernel"] + params["body"]["bias"], 0)
        logits = hidden @ params["head"]["kernel"]
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        dlogits = (share - np.eye(3)[y]) / 11
        dhidden = dlogits @ params["head"]["kernel"].T * (hidden > 0)
        grads = {
            "body": {"kernel": x.T @ dhidden, "bias": dhidden.sum(0)},
            "head": {"kernel": hidden.T @ dlogits},
        }
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 0.5, "the gradient is clipped"
        velocity = jax.tree.map(lambda v, g, n=norm: 0.9 * v + 0.5 * g / n, velocity, grads)
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * step / 2))
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found.params, params)


def test_a_criterion_of_one_s_own(tmp_path):
    def squares(logits, labels):
        return jnp.mean((logits - jax.nn.one_hot(labels, 3)) ** 2)

    x, y = examples().inputs[0, :4], examples().labels[:4]
    value = loop.loss_of(apply_fn, criterion=squares)(initial(), x, y)
    assert value == squares(apply_fn(initial(), x), y)
    found = fit(tmp_path, calibrate=None, criterion=squares)
    assert lines(tmp_path)[0]["loss"] > 2 * found.loss


def test_a_transform_comes_before_clipping(tmp_path):
    """Gradients that are made a thousand times greater are clipped to the same norm."""
    scale = 1000.0
    times = optax.stateless(lambda updates, _: jax.tree.map(lambda g: g * scale, updates))
    plain = fit(tmp_path / "plain", calibrate=None, clip=1e-3)
    found = fit(tmp_path / "scaled", calibrate=None, clip=1e-3, transform=times)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found,
        plain._replace(
            loss=found.loss,
            step_seconds=found.step_seconds,
            calibration_seconds=found.calibration_seconds,
        ),
    )


def test_dropout_has_a_new_key_each_step_and_the_same_after_a_stop(tmp_path, monkeypatch):
    seen = []

    def dropping(params, x, dropout):
        jax.debug.callback(lambda key: seen.append(bytes(key)), jax.random.key_data(dropout))
        keep = jax.random.bernoulli(dropout, 0.5, (len(x), 8))
        hidden = jax.nn.relu(x @ params["body"]["kernel"] + params["body"]["bias"])
        return jnp.where(keep, hidden * 2, 0) @ params["head"]["kernel"]

    options = {"calibrate": None, "dropout": True, "micro_batch": None, "apply": dropping}
    whole = fit(tmp_path / "whole", **options)
    assert len(set(seen)) == 15  # steps
    with monkeypatch.context() as context:
        context.setattr(loop.metrics.Metrics, "append", stopping(loop.metrics.Metrics.append, 9))
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "stopped", **options)
    assert_equal(fit(tmp_path / "stopped", **options).params, whole.params)


def stopping(append, step):
    def stopped(log, line):
        append(log, line)
        if line["step"] == step:
            raise KeyboardInterrupt

    return stopped


def test_windows_end_with_their_epoch(tmp_path):
    found = fit(tmp_path)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [line["steps"] for line in log] == [2, 2, 1] * 3
    assert [line["epoch"] for line in log] == [0] * 3 + [1] * 3 + [2] * 3
    last = sum(line["loss"] * line["steps"] for line in log[-3:]) / STEPS
    assert found.loss == pytest.approx(last) and found.loss < log[0]["loss"]
    rates = [line["learning_rate"] for line in log]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert len(found.step_seconds) == 15 - loop.WARM_UP_STEPS
    assert found.calibration_seconds > 0


def test_only_what_is_trainable_changes(tmp_path):
    found = fit(tmp_path, calibrate=lance_jax.Factors, trainable=["^head/"]).params
    assert_equal(found["body"], initial()["body"])
    assert np.any(found["head"]["kernel"] != initial()["head"]["kernel"])


def test_views_are_drawn_at_random(tmp_path):
    one = examples()
    same = Features(np.repeat(one.inputs, 2, axis=0), one.labels)
    plain = fit(tmp_path / "plain").params
    assert_equal(fit(tmp_path / "same", same).params, plain)
    first, second = (
        Features(np.stack(views), one.labels)
        for views in ((one.inputs[0], -one.inputs[0]), (-one.inputs[0], one.inputs[0]))
    )
    runs = [fit(tmp_path / str(i), data).params for i, data in enumerate((first, second))]
    kernels = [run["body"]["kernel"] for run in (plain, *runs)]
    assert all(np.any(a != b) for a, b in zip(kernels, [*kernels[1:], kernels[0]], strict=True))


def test_micro_batches_change_the_rounding_alone(tmp_path):
    whole = fit(tmp_path / "whole", calibrate=None).params
    assert fit(tmp_path / "whole", calibrate=None, micro_batch=9).micro_batch == 4
    found = fit(tmp_path / "micro", calibrate=None, micro_batch=3)
    assert found.micro_batch == 3
    one = fit(tmp_path / "one", calibrate=None, micro_batch=None)
    assert one.micro_batch == 4
    for run in (found, one):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run.params, whole
        )


@pytest.mark.parametrize(("micro_batch", "count"), [(None, 1), (4, 2), (3, 1), (2, 2)])
def test_a_micro_batch_is_divided_among_the_devices(tmp_path, monkeypatch, micro_batch, count):
    two_devices()
    divided, found = devices.divided, []

    def counting(value_and_grad, mesh):
        found.append(mesh.size)
        return divided(value_and_grad, mesh)

    monkeypatch.setattr(devices, "divided", counting)
    params = fit(tmp_path, calibrate=None, micro_batch=micro_batch, epochs=1).params
    assert found == [count]
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {1}


def test_a_chosen_micro_batch_is_said_and_kept(tmp_path, monkeypatch, capsys):
    timed = []

    def least_seconds(calls):
        timed.append({size: jax.block_until_ready(call()) for size, call in calls.items()})
        return {size: 1.0 if size == 4 else 2.0 for size in calls}

    monkeypatch.setattr(loop, "least_seconds", least_seconds)
    found = fit(tmp_path, batch_size=11, micro_batch=0, epochs=1)
    assert found.micro_batch == 4 and "micro-batches of 4 (" in capsys.readouterr().out
    (losses,) = ([value for value, _ in calls.values()] for calls in timed)
    assert list(timed[0]) == [4, 11]  # no 16, which is more than the batch
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    monkeypatch.setattr(loop, "least_seconds", None)
    assert fit(tmp_path, batch_size=11, micro_batch=0, epochs=1).micro_batch == 4


@pytest.mark.parametrize(
    ("places", "width", "sizes"), [(500, 6, [2, 4, 12]), (1, 300, [12])], ids=["few", "many"]
)
def test_parameters_so_many_that_micro_batches_keep_more(monkeypatch, places, width, sizes):
    """The sums of the gradients are as large as the trained parameters."""
    monkeypatch.setattr(loop, "MICRO_BATCHES", (2, 4))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, places, width)), jnp.float32)
    params = {"w": jnp.ones((width, width)) / width, "head": jnp.ones((width, 3))}

    def apply_fn(params, x):
        return (jnp.tanh(x @ params["w"]) @ params["head"]).mean(1)

    gradients = loop.gradients_of(loop.loss_of(apply_fn), None, 12)
    calls = loop.in_micro_batches(gradients, params, (x, jnp.asarray(rng.integers(0, 3, 12))))
    assert list(calls) == sizes
    losses = [call()[0] for call in calls.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def files():
    """Pictures that are decoded, and mirrored at random, batch by batch."""
    return pictures(22, flip=True)[0]


def test_pictures_are_trained_on_as_their_features_are(tmp_path):
    """The same views of the same pictures in the same steps."""
    data = files()
    views = np.stack([data.read(range(22), view) for view in (0, 1)])
    found = fit(tmp_path / "pictures", data, calibrate=None)
    expected = fit(tmp_path / "features", Features(views, data.labels), calibrate=None)
    assert_equal(found.params, expected.params)
    assert found.loss == expected.loss
    unmirrored = fit(tmp_path / "unmirrored", data._replace(flip=False), calibrate=None)
    assert unmirrored.loss != found.loss


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """(examples, the end of a run on them, its lines)."""
    data = examples(views=2) if request.param == "features" else files()
    directory = tmp_path_factory.mktemp("whole")
    return data, fit(directory, data), lines(directory)


@pytest.mark.parametrize(
    ("whole", "saves"),
    [("features", 1), ("features", 2), ("features", 3), ("features", 5), ("pictures", 3)],
    indirect=["whole"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch, whole, saves, when):
    """Stopped just before and just after the checkpoint number `saves` (the first is step 0)."""
    data, expected, log = whole
    save, count = checkpoint.Checkpoints.save, 0

    def killing_save(self, now):
        nonlocal count
        count += 1
        if count == saves and when == "before":
            raise Killed
        save(self, now)
        if count == saves:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint.Checkpoints, "save", killing_save)
        fit(tmp_path / "stopped", data)
    stopped = fit(tmp_path / "stopped", data)
    assert_equal(stopped.params, expected.params)
    assert_equal(dict(stopped.factors), dict(expected.factors))
    assert stopped.loss == expected.loss
    assert without_times(lines(tmp_path / "stopped")) == without_times(log)
    again = fit(tmp_path / "stopped", data)
    assert_equal(again.params, expected.params)
    assert again.loss == expected.loss


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    """The picture of the 9th step is bad: windows before are kept, and the step is named."""
    data = examples()
    order = np.random.default_rng((0, 1)).permutation(22)
    data.inputs[0, order[13]] = value
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 9 \(epoch 1\)"):
        fit(tmp_path, data, calibrate=None)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5, 7]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "7"}


def test_a_last_step_that_overflows_is_told(tmp_path):
    """No loss comes after it that would tell."""
    data = examples()._replace(inputs=1e3 * examples().inputs)
    with pytest.raises(FloatingPointError, match="after the last step '.*kernel' holds NaN or Inf"):
        fit(tmp_path, data, calibrate=None, batch_size=22, epochs=1, rate=1e38, clip=1e9)


@pytest.mark.parametrize("epochs", [2, 3], ids=["in the middle", "at the end"])
def test_lost_metrics_are_told_before_more_is_trained(tmp_path, monkeypatch, epochs):
    fit(tmp_path, epochs=2)
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.setattr(loop, "_window", None)
    with pytest.raises(ValueError, match="tells of 0 steps of a run that has done 10; put it back"):
        fit(tmp_path, epochs=epochs)
