"""Trained models: written whole, read by plain forward passes, predicted from and exported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lance_jax import data, predict, problem, train
from lance_jax.models import weights
from lance_jax.models.digits import DigitsNet
from lance_jax.models.network import as_variables, shapes
from lance_jax.pictures import Pictures
from tests import test_models_mcunet as mcunet
from tests import test_models_mobilenet as mobilenet
from tests import test_models_resnet as resnet
from tests.pretrained import Reference
from tests.reference import Conv
from tests.settings import settings
from tests.test_models_network import NETWORKS, drawn
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[1]
CLASSES = ("5", "6", "7", "8", "9")

# --- Each kind of network

# MobileNetV2 cut short: 2 of its blocks
STAGES, BLOCKS = (
    (mobilenet.mobilenet.STAGES[0], (6, 24, 1, 2)),
    dict([*mobilenet.BLOCKS.items()][:2]),
)
# the forward pass in float64 that draws, or uses, a state dict; and what the file says
FAMILIES = {
    "resnet": (
        lambda file, x: resnet.reference(file, x, [1, 1], 4),
        {"kind": "resnet", "stages": [1, 1], "width": 4, "resolution": 33},
    ),
    "mobilenetv2": (
        lambda file, x: mobilenet.reference(file, x, 16, mobilenet.CHANNELS),
        {"kind": "mobilenetv2", "width": 0.35, "resolution": 33},
    ),
    "mcunet": (mcunet.folded, mcunet.ARCHITECTURE),
}


def drawn_pictures(name, data_dir, split, side, classes):
    images = np.random.default_rng(0).uniform(-1, 1, (8, side, side, 3)).astype(np.float32)
    return Pictures(images, np.arange(8, dtype=np.int32) % 7, tuple("abcdefg"), side)


def changed(params):
    """Other values for all that can be trained: parameters, and statistics of batch norm."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) * rng.uniform(0.8, 1.2, leaf.shape).astype("f"), params
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_the_whole_trained_network(name, tmp_path, monkeypatch, exact_products):
    """From the file alone, in float64, come the logits of the trained part on frozen features."""
    monkeypatch.setattr(mobilenet.mobilenet, "STAGES", STAGES)
    monkeypatch.setattr(mobilenet, "BLOCKS", BLOCKS)
    monkeypatch.setattr(data, "tfds_pictures", drawn_pictures)
    forward, architecture = FAMILIES[name]
    x = drawn_pictures("", "", "", architecture["resolution"], ()).images
    began = Reference()
    forward(began, x[:1])
    path = began.save(tmp_path / "began.safetensors", **architecture)
    small = {"resolution": 0, "cache_dir": "", "flip": False, "trainable_layers": 2}
    small["batch_size"] = 8
    config = settings("pets", weights=str(path), **small)
    ready = problem.prepare(config, tmp_path / "run")
    params = changed(ready.params)
    path = tmp_path / "trained.safetensors"
    train.save_model(path, ready, params)

    ours = jax.jit(ready.apply_fn)(params, jnp.asarray(ready.evaluation.read(range(8))))
    ended = Reference()
    ended.tensors = load_file(path)
    assert_close(ours, forward(ended, x))
    assert ended.tensors.keys() == began.tensors.keys()
    kept = {n for n, tensor in began.tensors.items() if np.array_equal(tensor, ended.tensors[n])}
    assert kept and began.tensors.keys() - kept, "a part is frozen, and a part trained"
    if name != "mcunet":  # the statistics of either part
        assert 0 < sum("running" in n for n in kept) < sum("running" in n for n in began.tensors)
    assert weights.classes(path) == tuple("abcdefg")


def test_a_saved_model_can_be_fine_tuned(tmp_path, monkeypatch):
    """As it is, but for a new head."""
    monkeypatch.setattr(data, "tfds_pictures", drawn_pictures)
    network = NETWORKS["mcunet"]
    variables = drawn(network)
    weights.save(tmp_path / "file.safetensors", network, variables, tuple("abcde"))
    config = settings("pets", weights=str(tmp_path / "file.safetensors"), resolution=0)
    config.update({"cache_dir": "", "batch_size": 8})
    config.trainable_layers = 4  # all: no features to be computed
    ready = problem.prepare(config, tmp_path / "run")
    params = as_variables(ready.params)
    assert params["params"].pop("head")["kernel"].shape[-1] == 7
    del variables["params"]["head"]
    jax.tree.map(np.testing.assert_array_equal, params, variables)


def test_a_network_for_grey_pictures_is_not_fine_tuned_on_coloured_ones(run, tmp_path):
    config = settings("pets", weights=str(run / "head" / weights.FILE), resolution=0, cache_dir="")
    with pytest.raises(ValueError, match="of a DigitsNet, which takes no coloured pictures"):
        problem.prepare(config, tmp_path / "run")


# --- A run on the digits


def pretrained_digits(config, workdir):
    """Parameters drawn instead of trained, which takes most of a small run's time."""
    rng = np.random.default_rng(0)

    def draw(shape):
        deviation = np.sqrt(1 / np.prod(shape[:-1])) if len(shape) > 1 else 0  # of a bias
        return rng.normal(0, deviation, shape).astype(np.float32)

    return jax.tree.map(lambda leaf: draw(leaf.shape), shapes(DigitsNet(classes=5))["params"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, workdir, problem, result) of a finished run of one method."""
    workdir = tmp_path_factory.mktemp("digits")
    config = settings(method="head", epochs=8, learning_rate={"head": 0.4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "pretrain_digits", pretrained_digits)
        patch.setattr(train, "saved_bytes", lambda *_: ({}, {}))  # nothing here is about bytes
        ready = problem.prepare(config, workdir)
        yield config, workdir, ready, train.run(config, workdir, "head", ready)


@pytest.fixture
def run(trained):
    """Its working directory."""
    return trained[1]


def digits_reference(tensors, x):
    """Logits of the digits' network in float64."""

    def conv(x, name, stride=1):
        weight = tensors[f"{name}.weight"].astype(np.float64)
        sides = (stride, stride)
        op = Conv(x.shape, weight.shape, ("NHWC", "OIHW", "NHWC"), sides, "SAME")
        return op.forward(x, weight) + tensors[f"{name}.bias"]

    x = np.maximum(conv(x, "stem"), 0)
    for i, stride in enumerate((1, 2, 1, 1)):
        y = conv(np.maximum(conv(x, f"blocks.{i}.conv1", stride), 0), f"blocks.{i}.conv2")
        if f"blocks.{i}.shortcut.weight" in tensors:
            x = conv(x, f"blocks.{i}.shortcut", stride)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ tensors["head.weight"].T + tensors["head.bias"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Picture files of the test's digits, their pixels (n, 8, 8, 1) in -1 to 1, and labels."""
    pictures = data.digits("test", CLASSES)
    n = len(pictures.labels)
    pixels = np.rint((pictures.read(range(n))[..., 0] + 1) * 127.5).astype(np.uint8)
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(n)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths, pixels[..., None] / 127.5 - 1, pictures.labels


def call(capsys, *arguments):
    """(exit status, lines of stdout, stderr) of the program."""
    try:
        predict.main([*map(str, arguments)])
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # Python prints it
            print(code, file=sys.stderr)
            code = 1
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_json_has_the_probabilities_of_the_exported_network(
    trained, digits, tmp_path, capsys, exact_products
):
    _, run, _, result = trained
    paths, pixels, labels = digits
    file = tmp_path / "file.safetensors"
    options = ["--json", "--export", file, "--workdir", run]
    code, lines, err = call(capsys, paths[0], *options, *paths[1:])
    assert code == 0 and err == f"model: {run / 'head' / weights.FILE}\n"
    found = [json.loads(line) for line in lines]
    assert [line["file"] for line in found] == [*map(str, paths)]
    logits = digits_reference(load_file(file), pixels[:40])  # of two batches
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for line, row in zip(found[:40], expected, strict=True):
        assert tuple(line["probabilities"]) == CLASSES
        assert_close([*line["probabilities"].values()], row, scale=1)
        assert line["class"] == CLASSES[np.argmax(row)]
        assert line["probability"] == max(line["probabilities"].values())
    right = [line["class"] == CLASSES[k] for line, k in zip(found, labels, strict=True)]
    # the files' pixels are rounded to 8 bits: one digit may fall to the other side
    assert np.mean(right) == pytest.approx(result["test_accuracy"], abs=1.5 / len(labels))
    assert {line["class"] for line in found} == {*CLASSES}


def test_unreadable_pictures_are_named_and_the_others_predicted(
    run, digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict, "BATCH", 2)
    (tmp_path / "empty.png").write_bytes(b"")
    good, missing = digits[0][:3], tmp_path / "missing.png"
    options = ["--workdir", run / "head", "--json"]
    _, alone, _ = call(capsys, *options, *good)
    images = [missing, good[0], good[1], tmp_path / "empty.png", tmp_path, good[2]]
    code, lines, err = call(capsys, *options, *images)
    assert code == 1 and len(lines) == 3
    for line, other in zip(lines, alone, strict=True):
        line, other = json.loads(line), json.loads(other)
        assert (line["file"], line["class"]) == (other["file"], other["class"])
        assert line["probability"] == pytest.approx(other["probability"], abs=1e-5)
    errors = err.splitlines()[1:]
    assert len(errors) == 3 and all(line.startswith("error: picture ") for line in errors)
    for line, path in zip(errors, (missing, tmp_path / "empty.png", tmp_path), strict=True):
        assert repr(str(path)) in line


def test_pictures_of_other_kinds_are_the_same_digit(run, digits, tmp_path, capsys):
    """Coloured, of 16 bits, and turned by EXIF, as `pictures.decode` reads them."""
    grey = Image.open(digits[0][0])
    paths = [tmp_path / name for name in ("colour.png", "bits.png", "turned.png")]
    grey.convert("RGB").save(paths[0])
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(paths[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    grey.transpose(Image.Transpose.ROTATE_90).save(paths[2], exif=exif)
    code, lines, _ = call(capsys, "--workdir", run / "head", "--json", digits[0][0], *paths)
    assert code == 0
    rows = [[*json.loads(line)["probabilities"].values()] for line in lines]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], atol=1e-5)


def test_names_that_are_no_utf8(run, digits, tmp_path, capsys):
    """Of a folder of pictures, which is a class, and of a picture."""
    classes = [os.fsdecode(f"L\xf6we {i}".encode("latin-1")) for i in range(5)]
    file = tmp_path / weights.FILE
    weights.save(file, *weights.load(run / "head" / weights.FILE), classes)
    picture = tmp_path / os.fsdecode(b"\xe4.png")
    picture.write_bytes(digits[0][0].read_bytes())
    code, lines, _ = call(capsys, "--workdir", tmp_path, picture)
    assert code == 0 and "\ufffd.png  L\ufffdwe " in lines[0]
    code, lines, _ = call(capsys, "--workdir", tmp_path, "--json", picture)
    found = json.loads(lines[0])
    assert code == 0 and found["file"] == str(picture) and {*found["probabilities"]} == {*classes}


def test_a_reader_that_wants_no_more(run, digits):
    """`lance_jax.predict ... | head` ends without a word."""
    command = [sys.executable, "-m", "lance_jax.predict", "--workdir", run, *digits[0][:3]]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    process.stdout.close()
    _, err = process.communicate()
    assert process.returncode == 1 and err == f"model: {run / 'head' / weights.FILE}\n"


def test_an_interrupt_is_one_line(run, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", stop)
    code, _, err = call(capsys, "--workdir", run, "picture.png")
    assert code == 1 and err.endswith("error: interrupted\n")


def copied(run, workdir, **accuracies):
    """A working directory of methods with these accuracies and one model."""
    for method, accuracy in accuracies.items():
        (workdir / method).mkdir(parents=True)
        (workdir / method / weights.FILE).write_bytes((run / "head" / weights.FILE).read_bytes())
        result = {"config": {"eval_split": "validation"}, "validation_accuracy": accuracy}
        (workdir / method / "result.json").write_text(json.dumps(result))
    return workdir


def test_the_method_with_the_best_accuracy_is_taken_and_told(run, digits, tmp_path, capsys):
    """A line for each picture begins with its name; the likeliest classes stand in order."""
    workdir = copied(run, tmp_path, head=0.5, bias=0.75, lance=0.625)
    code, lines, err = call(capsys, "--workdir", workdir, *digits[0][9:12])  # names of 2 lengths
    assert code == 0 and err == (
        f"model: {workdir / 'bias' / weights.FILE} "
        "(validation accuracy 75.0%, the best of head, bias, lance)\n"
    )
    assert len({len(line) for line in lines}) == 1, "aligned"
    for line, path in zip(lines, digits[0][9:12], strict=True):
        name, *words = line.split()
        assert name == str(path) and set(words[::2]) <= set(CLASSES) and len(words) == 6
        shares = [float(word.removesuffix("%")) for word in words[1::2]]
        assert shares == sorted(shares, reverse=True) and 60 <= sum(shares) <= 100.2


def test_the_choice_of_a_model(run, tmp_path):
    workdir = copied(run, tmp_path, backprop=0.5)
    file = workdir / "backprop" / weights.FILE
    for place, method in ((workdir, ""), (workdir, "backprop"), (workdir / "backprop", "")):
        assert predict.trained_model(place, method) == (file, "")
    copied(run, tmp_path, head=0.5)
    assert predict.trained_model(workdir)[0] == workdir / "head" / weights.FILE, "of equals"
    (workdir / "head" / "result.json").write_text("{}")
    with pytest.raises(
        ValueError, match="head/result.json' does not say .* choose one by --method"
    ):
        predict.trained_model(workdir)
    assert predict.trained_model(workdir, "backprop") == (file, "")


def bad_arguments(kind, run, workdir):
    """Arguments for a kind of mistake in a copy of a run, and a part of the message."""
    model = workdir / "head" / weights.FILE
    options = ["--workdir", workdir]
    match kind:
        case "no workdir":
            return ["--workdir", workdir / "nowhere"], "nowhere' is no folder"
        case "unfinished":
            model.unlink()
            return options, "holds no trained model .* by the same command again"
        case "method":
            return [*options, "--method", "lora"], "'lora', and .* holds trained models of head$"
        case "cut short":
            model.write_bytes(model.read_bytes()[:-9])
            return options, "is not a safetensors file .* Remove it, and the command"
        case "other weights":
            save_file(load_file(model), model, {})
            return options, "do not say what network"
        case "no names":
            weights.save(model, *weights.load(model))
            return options, "names 0 classes, and its network has 5"
        case "export to a folder":
            return [*options, "--export", workdir], "exists, and is no file"
        case "export to no folder":
            return [*options, "--export", workdir / "no" / "file"], "lies in no folder that exists"
        case "export to a long name":
            return [*options, "--export", workdir / ("x" * 256)], "File name too long"


@pytest.mark.parametrize(
    "kind",
    [
        "no workdir",
        "unfinished",
        "method",
        "cut short",
        "other weights",
        "no names",
        "export to a folder",
        "export to no folder",
        "export to a long name",
    ],
)
def test_mistakes_are_one_line_before_any_picture_is_read(run, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "decode", lambda *_: pytest.fail("a picture was read"))
    workdir = copied(run, tmp_path / "copy", head=0.5)
    arguments, message = bad_arguments(kind, run, workdir)
    before = sorted(workdir.rglob("*"))
    code, lines, err = call(capsys, *arguments, "picture.png")
    errors = [line for line in err.splitlines() if not line.startswith("model: ")]
    assert code == 1 and not lines and len(errors) == 1 and errors[0].startswith("error: ")
    assert re.search(message, errors[0]), errors[0]
    assert sorted(workdir.rglob("*")) == before, "nothing half-written is left"


def test_exports_alone_and_over_a_file(run, tmp_path, capsys):
    file = tmp_path / "file.safetensors"
    file.write_text("older")
    other = tmp_path / "file.safetensors.tmp"
    other.write_text("another's")
    code, lines, _ = call(capsys, "--workdir", run, "--export", file)
    assert code == 0 and not lines
    assert file.read_bytes() == (run / "head" / weights.FILE).read_bytes()
    assert {*tmp_path.iterdir()} == {file, other} and other.read_text() == "another's"
    assert file.stat().st_mode == (run / "head" / weights.FILE).stat().st_mode


def test_neither_pictures_nor_an_export(run, capsys):
    code, _, err = call(capsys, "--workdir", run)
    assert code == 2 and "give pictures, or --export FILE" in err


def test_a_finished_run_without_its_model_writes_it(trained):
    """One that was killed at its end, or is of before there were models."""
    config, run, problem, _ = trained
    file, log = run / "head" / weights.FILE, run / "head" / "metrics.jsonl"
    before, lines = load_file(file), log.read_text()
    file.unlink()
    train.run(config, run, "head", problem)
    again = load_file(file)
    assert again.keys() == before.keys()
    assert all(np.array_equal(again[name], before[name]) for name in before)
    assert log.read_text() == lines, "nothing was trained"


def test_a_run_of_continual_learning_is_not_for_this_command(tmp_path):
    end = tmp_path / "lance" / "tasks" / "5"
    end.mkdir(parents=True)
    (end / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="is that of continual learning, whose network has a head"):
        predict.trained_model(tmp_path)
