"""Training learns, reports right numbers, and writes a checkpoint that loads anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from alexnet_triton import FusedSequential, fuse, reference_lenet
from alexnet_triton.data.augment import EVERYTHING, NOTHING, Augment, to_input
from alexnet_triton.data.dataset import Dataset
from alexnet_triton.data.fashion_mnist import CLASSES, load_fashion_mnist
from alexnet_triton.models import init_xavier_uniform
from alexnet_triton.optim import SGD
from alexnet_triton.training.checkpoint import FORMAT, Checkpoint, CheckpointError, read_checkpoint, save_checkpoint
from alexnet_triton.training.evaluation import evaluate, measure_speed
from alexnet_triton.training.listener import SILENT, Listener
from alexnet_triton.training.loop import train
from alexnet_triton.training.metrics import EpochMetrics
from alexnet_triton.training.networks import float32_products, load_checkpoint, new_model
from alexnet_triton.training.plot import plot_curves
from alexnet_triton.training.recipe import Recipe, Where
from alexnet_triton.training.trainer import Trainer
from kernels.runtime.arguments import conv_input_precision, matmul_input_precision

from .listeners import Asked, Watching

CPU = torch.device("cpu")

#: Under ttsem there seems to be a GPU, but nothing can be captured.
HAS_GPU = torch.cuda.is_available() and "ttsem" not in sys.modules
needs_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _pytorch_where_kernels_are_slow() -> Iterator[None]:
    """Run on PyTorch's operations, unless a GPU runs the kernels or a test selects them."""
    with kernels.use_backend("auto" if HAS_GPU else "torch"):
        yield


def small_net(dropout: float = 0.0) -> FusedSequential:
    """Every kind of layer of AlexNet, for 28 x 28 images."""
    return FusedSequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 10),
    )


def small_recipe(augment: Augment = NOTHING, dtype: torch.dtype = torch.float32, **fields: Any) -> Recipe:
    """A recipe with batches of 16 images of 28 x 28 pixels."""
    kept = {"model": "lenet", "batch_size": 16, "lr": 0.1, "dtype": str(dtype).removeprefix("torch.")}
    return Recipe(**(kept | dataclasses.asdict(augment) | fields))


def sample(train: int, test: int) -> Dataset:
    """The sample, limited to ``train`` and ``test`` images."""
    data = load_fashion_mnist("sample")
    return dataclasses.replace(data, train=data.train.limited(train), test=data.test.limited(test))


def small_trainer(
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    images: int = 40,
    graph: bool = False,
    **fields: Any,
) -> Trainer:
    """A trainer with batches of 16, so that 40 images are two and a half batches, and always the same weights."""
    torch.manual_seed(7)
    net = small_net(dropout).to(device=device, dtype=dtype)
    return Trainer(net, sample(images, 0).train, small_recipe(dtype=dtype, **fields), Where(device, graph))


def _train(
    out: Path, seed: int = 0, epochs: int = 1, limit: int = 64, lr: float = 0.9, listener: Listener = SILENT
) -> tuple[nn.Module, list[EpochMetrics]]:
    net = new_model("lenet", seed, CPU)
    recipe = small_recipe(seed=seed, epochs=epochs, lr=lr)
    with kernels.use_backend("torch"):
        history = train(net, sample(limit, 50), recipe, Where(CPU), out, listener)
    return net, history


def test_xavier_uniform_as_d2l() -> None:
    net = reference_lenet()
    net.apply(init_xavier_uniform)
    bound = (6 / (400 + 120)) ** 0.5
    weight = net[7].weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("images", [64, 59], ids=["whole_batches", "a_smaller_last_batch"])
def test_one_epoch_is_the_plain_loop(images: int, tmp_path: Path) -> None:
    """Loss, accuracy and weights of an epoch equal those of a plain loop."""
    net, (metrics,) = _train(tmp_path, seed=3, limit=images)
    data = load_fashion_mnist("sample")
    train, test = data.train.limited(images), data.test.limited(50)
    torch.manual_seed(3)
    plain = reference_lenet().apply(init_xavier_uniform)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.9)
    loss_sum, right = 0.0, 0
    for index in torch.randperm(images, generator=torch.Generator().manual_seed(3)).split(16):
        logits = plain(to_input(train.images[index], 28))
        loss = F.cross_entropy(logits, train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(index)
        right += int((logits.argmax(1) == train.labels[index]).sum())
    assert metrics.loss == pytest.approx(loss_sum / images, rel=1e-5)
    assert metrics.train_acc == pytest.approx(right / images)
    with torch.no_grad():
        predicted = plain(to_input(test.images, 28)).argmax(1)
    assert metrics.test_acc == pytest.approx((predicted == test.labels).double().mean().item())
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_same_seed_same_run(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        losses.append(_train(tmp_path / name, seed=seed)[1][0].loss)
    assert losses[0] == losses[1] != losses[2]


def test_files_of_a_run(tmp_path: Path) -> None:
    net, history = _train(tmp_path, epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert list(lines[0]) == ["epoch", "loss", "train_acc", "test_acc", "images_per_s", "seconds", "test_loss", "lr"]
    assert lines[1]["loss"] == history[1].loss
    assert lines[0]["images_per_s"] == pytest.approx(64 / lines[0]["seconds"])
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    plain = reference_lenet()
    plain.load_state_dict(content["state_dict"], strict=True)
    loaded, checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", CPU)
    assert (checkpoint.model, checkpoint.classes, checkpoint.channels, checkpoint.size) == ("lenet", list(CLASSES), 1, 28)
    assert checkpoint.metrics == lines
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad(), kernels.use_backend("torch"):
        assert torch.equal(loaded(x), net.eval()(x))
        torch.testing.assert_close(plain(x), net(x))
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoint.pt", "best.pt"}


def test_evaluate_counts_the_last_partial_batch(tmp_path: Path) -> None:
    net, _ = _train(tmp_path)
    test = load_fashion_mnist("sample").test.limited(50)
    with kernels.use_backend("torch"):
        whole = evaluate(net, test, batch_size=50, image_size=28, device=CPU)
        parts = evaluate(net, test, batch_size=7, image_size=28, device=CPU)
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert parts.top5 is whole.top5 is None  # top-5 needs more than ten classes
    assert not net.training


def test_measuring_speed_leaves_no_trace() -> None:
    net = new_model("lenet", 0, CPU)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with kernels.use_backend("torch"):
        assert measure_speed(net, load_fashion_mnist("sample").train, 16, 28, CPU) > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"^epoch 1: the loss of step [23] of 4 is not finite; there is no checkpoint"):
        _train(tmp_path, lr=3e38)
    assert list(tmp_path.iterdir()) == []


def poisoned_at(step: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a gradient of the ``step``-th step to ``value``, so that the next step's loss is the first that shows it."""
    steps = 0
    real = SGD.step

    def poisoned(optimizer: SGD) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            optimizer.param_groups[0]["params"][-1].grad.fill_(value)
        real(optimizer)

    monkeypatch.setattr(SGD, "step", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (5, "epoch 2: the loss of step 2 of 4 is not finite"),
        (7, "epoch 2: the loss of step 4 of 4 is not finite"),
        (8, "epoch 2: the weights are not finite after step 4 of 4"),
    ],
)
def test_the_step_is_named_and_the_last_good_checkpoint_kept(
    step: int, message: str, dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds where the last step breaks the weights, which no loss of the epoch shows."""
    poisoned_at(step, value, monkeypatch)
    net = new_model("lenet", 0, CPU, dtype)
    with pytest.raises(FloatingPointError) as caught:
        train(net, sample(64, 20), small_recipe(dtype=dtype, epochs=3), Where(CPU), tmp_path)
    advice = f"{message}; the last good checkpoint is {tmp_path / 'checkpoint.pt'}: resume it with a smaller --lr"
    assert str(caught.value) == advice + ", or --dtype float32, whose range is wider" * (dtype == torch.float16)
    for name in ("checkpoint.pt", "best.pt"):
        checkpoint = read_checkpoint(tmp_path / name)
        assert len(checkpoint.metrics) == 1
        assert all(weight.isfinite().all() for weight in checkpoint.weights.values())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_is_stopped_does_not_save_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_at(6, math.nan, monkeypatch)
    asked = iter(range(100))
    with pytest.raises(FloatingPointError, match=r"epoch 2: the weights are not finite after step 2 of 4; the last good"):
        # After four steps, four batches of a test, two steps.
        _train(tmp_path, epochs=3, listener=Asked(lambda: next(asked) == 4 + 4 + 2))
    assert len(read_checkpoint(tmp_path / "checkpoint.pt").metrics) == 1


def test_a_progress_bar_ends_an_epoch_that_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar reads the loss anyway, so the epoch ends at once."""
    poisoned_at(1, math.nan, monkeypatch)
    monkeypatch.setattr("alexnet_triton.training.trainer._PROGRESS_INTERVAL", -1.0)
    trainer = small_trainer()
    seen: list[int] = []
    trainer.listener = Watching(lambda images, *_: seen.append(images))
    with pytest.raises(FloatingPointError, match="the loss of step 2 of 3 is not finite"):
        trainer.epoch(torch.Generator().manual_seed(1))
    assert seen == [16, 32]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "missing"])
def test_what_is_no_checkpoint_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        load_checkpoint(path, CPU)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of alexnet-triton"):
        load_checkpoint(path, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": "vgg"},
        {"state_dict": None},
        {"state_dict": {}},
        {"metrics": 3},
        {"training": 4},
        {"classes": ["one"]},
        {"classes": [1, 2]},
        {"channels": 2},
        {"size": 0},
        {"size": "28"},
    ],
    ids=str,
)
def test_an_incomplete_checkpoint_is_refused(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "part.pt"
    torch.save({"format": FORMAT, "model": "lenet", "classes": ["a", "b"], "metrics": [], "state_dict": {}} | change, path)
    with pytest.raises(CheckpointError, match=r"part\.pt: (holds an unknown model|its weights do not fit this lenet|damaged)"):
        load_checkpoint(path, CPU)


def test_curves_are_a_picture(tmp_path: Path) -> None:
    history = [EpochMetrics(i, 2.0 / i, 0.1 * i, 0.1 * i, 100.0, 1.0) for i in (1, 2, 3)]
    plot_curves(history, tmp_path / "curves.png", "title")
    from matplotlib.image import imread

    picture = imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (675, 1050)
    assert picture[..., :3].std() > 0.05


def test_an_epoch_sees_every_image_once_in_an_order_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer()

    def order(seed: int) -> list[int]:
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(trainer, "step", lambda index, count: seen.append(index))
        trainer.epoch(torch.Generator().manual_seed(seed))
        assert [len(index) for index in seen] == [16, 16, 8]
        return torch.cat(seen).tolist()

    assert sorted(order(1)) == list(range(40))
    assert order(1) == order(1)
    assert order(1) != order(2)


def _state(trainer: Trainer) -> list[torch.Tensor]:
    masters = [p if (m := trainer.optimizer.master(p)) is None else m for p in trainer.net.parameters()]
    return [t.detach().float().clone() for t in (*trainer.net.parameters(), *masters, trainer.loss_sum, trainer.correct)]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.slow),
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        ("torch", torch.float32),
    ],
    ids=str,
)
def test_a_warm_up_leaves_no_trace(backend: str, dtype: torch.dtype) -> None:
    """A warm-up changes nothing that follows: weights, masters, sums and random numbers."""
    after = []
    device = torch.device("cuda" if HAS_GPU and backend == "triton" else "cpu")
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        for warm_up in (False, True):
            trainer = small_trainer(device, dtype, dropout=0.5, images=10, batch_size=4)
            if warm_up:
                before = _state(trainer)
                trainer.warm_up()
                assert all(torch.equal(a, b) for a, b in zip(_state(trainer), before, strict=True))
                assert all(p.grad is None for p in trainer.net.parameters())
            trainer.epoch(torch.Generator(device).manual_seed(0))
            after.append(_state(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert trainer.loss_sum > 0


def test_full_batches_are_replayed_and_the_last_one_is_not() -> None:
    """The step itself stands for its capture: the batch reaches it through the tensor that a graph would read."""
    eager, replayed = small_trainer(), small_trainer()
    replays = 0

    def replay() -> None:
        nonlocal replays
        replays += 1
        replayed.step(replayed.index)

    replayed.replay = replay
    results = [t.epoch(torch.Generator().manual_seed(1))[:2] for t in (eager, replayed)]
    assert results[0] == results[1]
    assert replays == 2
    assert all(torch.equal(a, b) for a, b in zip(_state(eager), _state(replayed), strict=True))


def test_progress_does_not_read_the_loss_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, float]] = []
    trainer = small_trainer()
    monkeypatch.setattr("alexnet_triton.training.trainer._PROGRESS_INTERVAL", 1e9)
    trainer.listener = Watching(lambda *told: seen.append(told))
    loss, _, _ = trainer.epoch(torch.Generator().manual_seed(1))
    ((images, shown, speed),) = seen
    assert (images, shown) == (40, loss)
    assert speed > 0
    monkeypatch.setattr("alexnet_triton.training.trainer._PROGRESS_INTERVAL", -1.0)
    seen.clear()
    trainer.epoch(torch.Generator().manual_seed(1))
    assert [images for images, _, _ in seen] == [16, 32, 40]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_learns_what_float32_learns(dtype: torch.dtype) -> None:
    """Losses and weights of two epochs are close, since masters are kept in float32."""
    exact, half = small_trainer(), small_trainer(dtype=dtype)
    for epoch in range(2):
        losses = [t.epoch(torch.Generator().manual_seed(epoch))[0] for t in (exact, half)]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
    start = {k: v.to(dtype).float() for k, v in small_trainer().net.state_dict().items()}
    ours, theirs = half.float32_weights(), exact.float32_weights()
    assert ours.keys() == theirs.keys() == half.net.state_dict().keys()
    for key, weight in ours.items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.to(dtype).float())  # masters, not rounded parameters
        assert torch.equal(weight.to(dtype), half.net.state_dict()[key])
        moved = theirs[key] - start[key]
        assert (weight - theirs[key]).norm() < 0.2 * moved.norm()


def test_a_half_precision_checkpoint_is_float32_and_loads_anywhere(tmp_path: Path) -> None:
    net = new_model("lenet", 0, CPU, torch.bfloat16)
    listener, told = Listener(), []
    for name in ("ready", "epoch_begins", "batch", "epoch_ends"):
        setattr(listener, name, lambda *values, name=name: told.append((name, *values)))
    recipe = small_recipe(dtype=torch.bfloat16, epochs=1, lr=0.9)
    (metrics,) = train(net, sample(32, 20), recipe, Where(CPU), tmp_path, listener)
    assert told == [("ready",), ("epoch_begins", 1), ("epoch_ends", metrics)]
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {w.dtype for w in content["state_dict"].values()} == {torch.float32}
    loaded, _ = load_checkpoint(tmp_path / "checkpoint.pt", CPU)
    for key, weight in loaded.state_dict().items():
        assert torch.equal(weight.bfloat16(), net.state_dict()[key])


def test_augmented_images_are_others_at_every_step() -> None:
    """With constant weights, the losses of one batch differ exactly where images are drawn again."""
    every_part = [Augment(flip=True), Augment(crop="pad"), Augment(crop="resized"), Augment(colour=True)]
    for augment in (NOTHING, *every_part, EVERYTHING):
        trainer = small_trainer(lr=0.0, images=16, augment=augment)
        losses = {trainer.epoch(torch.Generator().manual_seed(0))[0] for _ in range(3)}
        assert len(losses) == (1 if augment == NOTHING else 3), augment


@pytest.mark.parametrize(("precision", "expected"), [("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")])
def test_tf32_is_switched_for_the_run_only(precision: str, expected: str) -> None:
    def now() -> tuple[str, str]:
        return conv_input_precision(torch.float32), matmul_input_precision(torch.float32)

    before = now()
    with float32_products(precision):
        assert now() == (expected, expected)
    assert now() == before
    with pytest.raises(KeyError), float32_products("tf32"):
        raise KeyError
    assert now() == before


@needs_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_graph_is_the_eager_step_bit_for_bit(dtype: torch.dtype) -> None:
    """There are three epochs with a smaller last batch each, without dropout, whose draws may differ."""
    trainers = [small_trainer(torch.device("cuda"), dtype, graph=graph) for graph in (False, True)]
    assert trainers[0].replay is None
    assert trainers[1].replay is not None
    results = []
    for trainer in trainers:
        generator = torch.Generator("cuda").manual_seed(1)
        results.append([trainer.epoch(generator)[:2] for _ in range(3)])
    assert results[0] == results[1]
    assert results[0][0] != results[0][2]
    assert all(torch.equal(a, b) for a, b in zip(*map(_state, trainers), strict=True))


@needs_a_gpu
@pytest.mark.parametrize("random", ["nothing", "dropout", "flip", "pad crop", "resized crop", "colour"])
def test_replays_draw_anew(random: str) -> None:
    """One batch is repeated with constant weights: the loss changes exactly where something is drawn."""
    cuda = torch.device("cuda")
    crop = random.removesuffix(" crop") if random.endswith(" crop") else "none"
    augment = Augment(flip=random == "flip", crop=crop, colour=random == "colour")  # type: ignore[arg-type]
    trainer = small_trainer(cuda, dropout=0.5 * (random == "dropout"), lr=0.0, images=16, graph=True, augment=augment)
    assert trainer.replay is not None
    losses = []
    for _ in range(4):
        trainer.loss_sum.zero_()
        trainer.replay()
        losses.append(trainer.loss_sum.item())
    assert len(set(losses)) == (1 if random == "nothing" else 4)


@needs_a_gpu
@pytest.mark.parametrize("crop", ["pad", "resized", "patch"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_same_seed_gives_the_same_bits_on_the_gpu(graph: bool, crop: str) -> None:
    runs = []
    for _ in range(2):
        augment = Augment(flip=True, crop=crop, colour=True)  # type: ignore[arg-type]
        trainer = small_trainer(torch.device("cuda"), torch.bfloat16, dropout=0.5, augment=augment, graph=graph)
        generator = torch.Generator("cuda").manual_seed(1)
        runs.append([trainer.epoch(generator)[:2] for _ in range(2)])
    assert runs[0] == runs[1]


@needs_a_gpu
@pytest.mark.parametrize("crop", ["pad", "resized", "patch"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_step_waits_for_the_gpu(graph: bool, crop: str) -> None:
    augment = Augment(flip=True, crop=crop, colour=True)  # type: ignore[arg-type]
    trainer = small_trainer(torch.device("cuda"), torch.bfloat16, dropout=0.5, augment=augment, graph=graph)
    index = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            if trainer.replay is not None:
                trainer.index.copy_(index)
                trainer.replay()
            trainer.step(index[:8])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.loss_sum.item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_keeps_float32_masters(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half precision learns as float32 does, and the checkpoint holds the masters instead of the rounded weights."""
    data = load_fashion_mnist("sample").train.limited(96)
    losses = {}
    for precision in (torch.float32, dtype):
        net = new_model("lenet", 0, CPU, precision)
        trainer = Trainer(net, data, small_recipe(lr=0.5), Where(CPU))
        with kernels.use_backend("torch"):
            losses[precision] = [trainer.epoch(torch.Generator().manual_seed(0))[0] for _ in range(2)]
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.03)
    weights = trainer.float32_weights()
    assert all(value.dtype == torch.float32 for value in weights.values())
    rounded = net.state_dict()
    assert all(torch.equal(weights[key].to(dtype), rounded[key]) for key in weights)
    assert any(not torch.equal(weights[key], rounded[key].float()) for key in weights)
    save_checkpoint(tmp_path / "checkpoint.pt", Checkpoint("lenet", list(CLASSES), [], weights))
    loaded, _ = load_checkpoint(tmp_path / "checkpoint.pt", CPU)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


def test_a_graph_needs_cuda() -> None:
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu"):
        Where(CPU, graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_step_is_the_eager_step(dtype: torch.dtype) -> None:
    """Bit-identical after two epochs with a smaller last batch; the capture itself changes nothing."""
    cuda = torch.device("cuda")
    data = load_fashion_mnist("sample").train.limited(150)
    results = []
    for graph in (False, True):
        net = new_model("lenet", 0, cuda, dtype)
        trainer = Trainer(net, data, small_recipe(batch_size=64, lr=0.5), Where(cuda, graph))
        generator = torch.Generator(cuda).manual_seed(0)
        epochs = [trainer.epoch(generator)[:2] for _ in range(2)]
        results.append((epochs, trainer.float32_weights()))
    (eager, eager_weights), (captured, captured_weights) = results
    assert eager == captured
    assert all(torch.equal(value, captured_weights[key]) for key, value in eager_weights.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_dropout_draws_anew_in_each_replay() -> None:
    cuda = torch.device("cuda")
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)).to(cuda)
    net = fuse(net)
    data = load_fashion_mnist("sample").train.limited(64)
    trainer = Trainer(net, data, small_recipe(batch_size=64, lr=0.0), Where(cuda, graph=True))
    same_order = [trainer.epoch(torch.Generator(cuda).manual_seed(0))[0] for _ in range(3)]
    assert len(set(same_order)) == 3
